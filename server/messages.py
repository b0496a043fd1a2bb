"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from aiohttp import web

from qjax.server.chat import render
from qjax.server.generation import answer_id, read_json
from qjax.server.messages_events import MessageWriter
from qjax.server.messages_protocol import NAMES, CountTokensRequest, MessagesRequest
from qjax.server.schema import parse
from qjax.server.state import STATE
from qjax.server.turn import Turn, answer, field_names


async def messages(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    body = parse(MessagesRequest, await read_json(request))
    with field_names(NAMES):
        chat = body.chat()
        model = state.check_model(body.model)
        request_id = answer_id(request, chat, "msg", "_")
        turn = await Turn.prepare(state, chat, request_id)
        return await answer(request, turn, MessageWriter(turn, model), {"request-id": request_id})


async def count_tokens(request: web.Request) -> web.Response:
    """The prompt's tokens, cached ones too."""
    state = request.app[STATE]
    body = parse(CountTokensRequest, await read_json(request))
    state.check_model(body.model)
    with field_names(NAMES):
        prompt = await render(state, body.chat())
    return web.json_response({"input_tokens": len(prompt.token_ids)})

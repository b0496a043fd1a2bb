"""POST /v1/responses: OpenAI's Responses API without its store. Items in, items out, whole or as events."""

import dataclasses

from aiohttp import web

from qjax.server.chat import render
from qjax.server.generation import answer_id, read_json
from qjax.server.protocol import ChatRequest
from qjax.server.responses_events import ResponseWriter
from qjax.server.responses_protocol import NAMES, ResponsesRequest
from qjax.server.schema import parse
from qjax.server.state import STATE, ServerState
from qjax.server.turn import Turn, answer, field_names


async def responses(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    body = parse(ResponsesRequest, await read_json(request))
    with field_names(NAMES):
        chat = body.chat()
        model = state.check_model(body.model)
        if body.truncation == "auto":
            chat = await without_oldest_turns(state, chat)
        request_id = answer_id(request, chat, "resp", "_")
        turn = await Turn.prepare(state, chat, request_id)
        return await answer(request, turn, ResponseWriter(body, turn, model))


async def without_oldest_turns(state: ServerState, chat: ChatRequest) -> ChatRequest:
    """The request with as many of its last turns as the context has room for beside the answer, and at least one.

    A turn is a user's message and what follows it. System messages at the beginning stay.
    """
    room = state.engine.max_model_len - (chat.max_tokens or 1)
    messages = chat.messages
    num_system = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    starts = [i for i, m in enumerate(messages) if m["role"] == "user"]

    def cut(start: int) -> ChatRequest:
        return dataclasses.replace(chat, messages=messages[:num_system] + messages[start:])

    async def fits(candidate: ChatRequest) -> bool:
        return len((await render(state, candidate)).token_ids) <= room

    if not starts or await fits(chat):
        return chat
    low, high = 0, len(starts) - 1  # the longest that fits begins at starts[low] or later
    while low < high:
        middle = (low + high) // 2
        if await fits(cut(starts[middle])):
            high = middle
        else:
            low = middle + 1
    return cut(starts[high])

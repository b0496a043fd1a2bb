"""POST /tokenize and /detokenize: what a prompt or a conversation becomes, without generating."""

import dataclasses
from dataclasses import MISSING, dataclass
from typing import Any

from aiohttp import web

from qjax.server.chat import render
from qjax.server.errors import bad_request
from qjax.server.generation import encode, read_json
from qjax.server.protocol import ChatRequest
from qjax.server.schema import body_field, parse
from qjax.server.state import STATE

# What of a chat request decides its prompt: the template reads the same messages here as there.
CHAT_FIELDS = (
    *("model", "messages", "tools", "tool_choice", "add_generation_prompt", "continue_final_message"),
    *("chat_template_kwargs", "reasoning_effort", "add_special_tokens"),
)
_WANTS_TEXTS = "Return each token's text too"


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """A text."""

    model: str | None = body_field("Name of the model; the served one if absent")
    prompt: str = body_field("Text", MISSING)
    add_special_tokens: bool | None = body_field("Let the tokenizer add its special tokens")
    return_token_strs: bool = body_field(_WANTS_TEXTS, False)


TokenizeChatRequest = dataclasses.make_dataclass(
    "TokenizeChatRequest",
    [
        *(
            (f.name, f.type, dataclasses.field(default=f.default, metadata=f.metadata))
            for f in dataclasses.fields(ChatRequest)
            if f.name in CHAT_FIELDS
        ),
        ("return_token_strs", bool, body_field(_WANTS_TEXTS, False)),
    ],
    frozen=True,
    kw_only=True,
    namespace={"__doc__": "A conversation."},
)


@dataclass(frozen=True, kw_only=True)
class DetokenizeRequest:
    model: str | None = body_field("Name of the model; the served one if absent")
    tokens: list[int] = body_field("Token ids", MISSING)


async def tokenize(request: web.Request) -> web.Response:
    state = request.app[STATE]
    body = await read_json(request)
    if isinstance(body, dict) and "messages" in body:
        conversation = parse(TokenizeChatRequest, body)
        wants_texts = conversation.return_token_strs
        chat = ChatRequest(**{name: getattr(conversation, name) for name in CHAT_FIELDS})
        state.check_model(chat.model)
        token_ids = (await render(state, chat)).token_ids
    else:
        text = parse(TokenizeRequest, body)
        state.check_model(text.model)
        wants_texts = text.return_token_strs
        token_ids = await encode(state, text.prompt, text.add_special_tokens)
    answer: dict[str, Any] = {"count": len(token_ids), "max_model_len": state.engine.max_model_len, "tokens": token_ids}
    if wants_texts:
        answer["token_strs"] = [state.engine.tokenizer.token_text(i) for i in token_ids]
    return web.json_response(answer)


async def detokenize(request: web.Request) -> web.Response:
    state = request.app[STATE]
    body = parse(DetokenizeRequest, await read_json(request))
    state.check_model(body.model)
    wrong = next((i for i in body.tokens if not 0 <= i < state.engine.vocab_size), None)
    if wrong is not None:
        raise bad_request(f"tokens must be ids from 0 to {state.engine.vocab_size - 1}, got {wrong}.", "tokens")
    return web.json_response({"prompt": state.engine.tokenizer.decode(body.tokens, skip_special_tokens=False)})

"""POST /v1/embeddings: texts, token ids or a conversation in, vectors out."""

import asyncio
import base64
import time
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from aiohttp import web

from qjax.outputs import EmbeddingOutput, PoolingRequestOutput
from qjax.pooling_params import PoolingParams
from qjax.server.errors import bad_request, from_value_error
from qjax.server.generation import answer_id, read_json
from qjax.server.pooling import MAX_INPUTS, PoolingFields, check_kind, json_answer, pool, tokenized, usage_of
from qjax.server.schema import Refused, body_field, parse
from qjax.server.state import STATE, ServerState
from qjax.text.pooling import cut, embedding_ids


@dataclass(frozen=True, kw_only=True)
class EmbeddingFields(PoolingFields):
    """What texts and conversations share."""

    encoding_format: Literal["float", "base64"] = body_field("base64: of little-endian float32", "float")
    dimensions: int | None = body_field("Length of the vectors; absent: the hidden size", minimum=1)
    add_special_tokens: bool = body_field("End each text with <|endoftext|>, as Qwen3-Embedding needs it", True)
    truncation_side: Literal["left", "right"] = body_field("The side that is cut off", "right")

    REFUSED: ClassVar[dict[str, Refused]] = {
        **PoolingFields.REFUSED,
        "embed_dtype": Refused("numbers are float32.", ("float32",)),
        "endianness": Refused("numbers are little-endian.", ("native", "little")),
        "chat_template": Refused("the server does not trust templates of requests; use --chat-template."),
    }


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest(EmbeddingFields):
    """Texts or token ids."""

    input: str | list[str] | list[int] | list[list[int]] = body_field("Text, token ids, or a list of either", MISSING)

    def inputs(self) -> list[str | list[int]]:
        """The inputs one by one.

        Raises:
          ApiError: 400, there is none, one is empty, or there are too many.
        """
        given = self.input
        is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        inputs: list[Any] = [given] if is_one else list(given)
        if not inputs or not all(inputs):
            raise bad_request("input must not be empty, and must not hold empty texts or lists.", "input")
        if len(inputs) > MAX_INPUTS:
            raise bad_request(f"input can have at most {MAX_INPUTS} items, got {len(inputs)}.", "input")
        return inputs


@dataclass(frozen=True, kw_only=True)
class EmbeddingChatRequest(EmbeddingFields):
    """A conversation, as the chat template writes it."""

    messages: list[dict[str, Any]] = body_field("The conversation", MISSING)
    add_generation_prompt: bool = body_field("Let the template open the assistant's turn", False)
    continue_final_message: bool = body_field("Leave the last message open", False)
    chat_template_kwargs: dict[str, Any] | None = body_field("Variables of the template")


async def embeddings(request: web.Request) -> web.Response:
    state = request.app[STATE]
    content = await read_json(request)
    is_chat = isinstance(content, dict) and "messages" in content
    body: EmbeddingChatRequest | EmbeddingRequest = parse(
        EmbeddingChatRequest if is_chat else EmbeddingRequest,  # type: ignore[arg-type]
        content,
    )
    model = state.check_model(body.model)
    check_kind(state, request.path, ("embed",))
    is_text = isinstance(body, EmbeddingRequest)
    inputs: list[str | list[int]] = body.inputs() if is_text else [await _render(state, body)]
    try:
        params = PoolingParams(dimensions=body.dimensions, use_activation=body.use_activation)
    except ValueError as error:
        raise from_value_error(error, ("dimensions",)) from None
    token_ids = await _token_ids(state, body, inputs)
    request_id = answer_id(request, body, "embd")  # type: ignore[arg-type]
    outputs = await pool(state, token_ids, params, body, request_id)
    answer = {
        "id": request_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [_datum(i, output, body.encoding_format) for i, output in enumerate(outputs)],
        "usage": usage_of(outputs),
    }
    size = 0 if body.encoding_format == "base64" else len(answer["data"][0]["embedding"])
    return await json_answer(answer, size * len(outputs))


async def _token_ids(state: ServerState, body: EmbeddingFields, inputs: list[str | list[int]]) -> list[list[int]]:
    tokenizer, limit, side = state.engine.tokenizer, body.token_limit(state), body.truncation_side

    def tokenize() -> list[list[int]]:
        return [
            embedding_ids(tokenizer, item, add_special_tokens=body.add_special_tokens, limit=limit, side=side)
            if isinstance(item, str)
            else cut(item, limit, side)
            for item in inputs
        ]

    return await tokenized(tokenize, sum(len(item) for item in inputs if isinstance(item, str)))


async def _render(state: ServerState, body: EmbeddingChatRequest) -> str:
    def template() -> str:
        return state.engine.tokenizer.apply_chat_template(
            body.messages,
            chat_template=state.chat_template,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            **{**state.config.default_chat_template_kwargs, **(body.chat_template_kwargs or {})},
        )

    try:
        return await asyncio.to_thread(template)
    except ValueError as error:
        raise from_value_error(error, ("messages", "chat_template_kwargs")) from None


def _datum(index: int, output: PoolingRequestOutput[EmbeddingOutput], encoding_format: str) -> dict[str, Any]:
    if output.outputs is None:
        raise RuntimeError("an embedding is missing")
    vector = output.outputs.vector
    is_text = encoding_format == "base64"
    embedding = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode() if is_text else vector.tolist()
    return {"index": index, "object": "embedding", "embedding": embedding}

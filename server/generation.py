"""From a checked request to the engine's deltas: prompts to tokens, limits, ids, and several prompts in one stream."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web

from qjax.outputs import STEP_FAILED, RequestOutput
from qjax.sampling_params import SamplingParams
from qjax.server import access_log
from qjax.server.errors import (
    ApiError,
    bad_request,
    could_not_compute,
    engine_failed,
    from_value_error,
    internal_error,
    shorten,
    unavailable,
)
from qjax.server.protocol import PARAM_NAMES, GenerationRequest
from qjax.server.request_id import request_id_of
from qjax.server.state import ServerState

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]  # (index of the prompt, delta)
ENCODINGS = ("identity", "gzip", "deflate")  # of bodies
LONG_TEXT = 32_768  # characters; tokenizing more than this would hold up everyone else's streams


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request. `text` is None where the client sent token ids."""

    token_ids: list[int]
    text: str | None = None


async def read_json(request: web.Request) -> Any:
    """The body as JSON.

    Raises:
      ApiError: 400, another content type or no JSON; 415, compressed in a way that is not supported.
    """
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ENCODINGS:
        message = f"Content-Encoding: {shorten(encoding)} is not supported; {', '.join(ENCODINGS)} are."
        raise ApiError(415, message, headers={"Accept-Encoding": ", ".join(ENCODINGS)})
    if request.content_type != "application/json":
        message = f"Unsupported Media Type: Only 'application/json' is allowed, got '{request.content_type}'."
        raise ApiError(400, message, type="Bad Request")
    try:
        return json.loads(await request.read(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise ApiError(400, f"The body is not valid JSON: {error}.", type="Bad Request") from None


def answer_id(request: web.Request, body: GenerationRequest, prefix: str, separator: str = "-") -> str:
    """The answer's id: the body's own, or that of the HTTP request."""
    return f"{prefix}{separator}{body.request_id or request_id_of(request)}"


async def encode(state: ServerState, text: str, add_special_tokens: bool | None) -> list[int]:
    tokenizer = state.engine.tokenizer
    try:
        if len(text) > LONG_TEXT:
            return await asyncio.to_thread(tokenizer.encode, text, bool(add_special_tokens))
        return tokenizer.encode(text, bool(add_special_tokens))
    except ValueError as error:
        raise from_value_error(error) from None


def truncate(state: ServerState, body: GenerationRequest, token_ids: list[int]) -> list[int]:
    """The part of the prompt that `truncate_prompt_tokens` keeps."""
    limit, longest = body.truncate_prompt_tokens, state.engine.max_model_len
    if limit is None:
        return token_ids
    if limit == -1:
        limit = longest - max(1, body.wanted_max_tokens() or 1)
    if not 1 <= limit <= longest:
        message = f"truncate_prompt_tokens must leave room in the context of {longest} tokens, got {limit}."
        raise bad_request(message, "truncate_prompt_tokens", limit)
    return token_ids[-limit:] if body.truncation_side == "left" else token_ids[:limit]


def check_limits(state: ServerState, prompt: Prompt, params: SamplingParams) -> SamplingParams:
    """The parameters with `max_tokens` set to what the context has room for.

    Raises:
      ApiError: 400, the prompt or the wanted answer does not fit; both numbers are named.
    """
    engine, num_tokens = state.engine, len(prompt.token_ids)
    longest = engine.max_model_len
    if num_tokens == 0:
        raise bad_request("The prompt is empty: at least one token is needed.", "prompt")
    if prompt.text is None and not (min(prompt.token_ids) >= 0 and max(prompt.token_ids) < engine.vocab_size):
        raise bad_request(f"The prompt has a token id outside the vocabulary, 0 to {engine.vocab_size - 1}.", "prompt")
    if num_tokens >= longest:
        which = "exceeds this limit even without any output tokens" if num_tokens > longest else "leaves no room"
        message = (
            f"This model's maximum context length is {longest} tokens. However, your prompt contains {num_tokens} "
            f"input tokens, which {which}. Please reduce the length of the input prompt."
        )
        raise bad_request(message, "input_tokens", num_tokens)
    if params.max_tokens is not None and params.max_tokens > longest:
        message = (
            f"max_tokens={params.max_tokens} cannot be greater than max_model_len={longest}. "
            "Please request fewer output tokens."
        )
        raise bad_request(message, "max_tokens", params.max_tokens)
    for name, words in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
        asked = getattr(params, name)
        if asked is not None and (engine.vocab_size if asked == -1 else asked) > engine.max_logprobs:
            message = f"Requested {words} logprobs of {asked}, which is greater than max allowed: {engine.max_logprobs}"
            raise bad_request(message, name, asked)
    room = longest - num_tokens
    try:
        max_tokens = min(params.max_tokens or room, room)
        return params.with_(max_tokens=max_tokens, top_k=min(params.top_k, engine.vocab_size))
    except ValueError as error:  # min_tokens is more than there is room for
        raise from_value_error(error, PARAM_NAMES) from None


async def generate(
    state: ServerState, body: GenerationRequest, prompts: list[Prompt], params: SamplingParams, request_id: str
) -> Outputs:
    """Deltas of all prompts as they come, each with its prompt's index. Closing it early aborts what still runs.

    Raises:
      ApiError: before the first delta where the request cannot be served; later where the engine failed.
    """
    checked = [check_limits(state, prompt, params) for prompt in prompts]
    if len(prompts) == 1:
        streams = [_deltas(state, body, prompts[0], checked[0], request_id, request_id)]
    else:
        streams = [
            _deltas(state, body, prompt, params, f"{request_id}-{i}", request_id)
            for i, (prompt, params) in enumerate(zip(prompts, checked, strict=True))
        ]
    async with contextlib.aclosing(_merge(streams)) as merged:
        async for i, output in merged:
            yield i, output


async def _deltas(
    state: ServerState,
    body: GenerationRequest,
    prompt: Prompt,
    params: SamplingParams,
    request_id: str,
    answer_id: str,
) -> AsyncGenerator[RequestOutput, None]:
    stream = state.engine.generate(
        prompt.token_ids, params, request_id, priority=body.priority, cache_salt=body.cache_salt
    )
    closing = contextlib.aclosing(cast(AsyncGenerator[RequestOutput, None], stream))
    is_first, record = True, access_log.current()
    with state.engine_request(request_id, answer_id):
        async with closing:
            try:
                async for output in stream:
                    is_first = False
                    record.add(output)
                    if failed := [delta for delta in output.outputs if delta.finish_reason == "error"]:
                        raise could_not_compute(failed[0].stop_reason == STEP_FAILED)
                    yield output
            except ApiError as error:
                record.error = str(error)
                raise
            except ValueError as error:
                if state.engine.is_sleeping:  # since the request came in
                    raise unavailable("The engine sleeps: POST /wake_up wakes it.") from error
                raise (from_value_error(error, PARAM_NAMES) if is_first else internal_error(error)) from error
            except Exception as error:
                failure = engine_failed() if state.engine.phase == "failed" else internal_error(error)
                record.error = str(failure)
                raise failure from error


async def _merge(streams: list[AsyncGenerator[RequestOutput, None]]) -> Outputs:
    """Several streams as one, in the order of arrival. The first failure ends all."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]):
            async for output in streams[0]:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue()

    async def pump(i: int, stream: Any) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for output in stream:
                    queue.put_nowait((i, output))
            queue.put_nowait((i, None))
        except Exception as error:
            queue.put_nowait((i, error))

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        num_left = len(streams)
        while num_left:
            i, item = await queue.get()
            if item is None:
                num_left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield i, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")

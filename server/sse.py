"""Server-sent events: a stream of JSON chunks over HTTP, ended by `data: [DONE]` where the API wants it."""

import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from types import MappingProxyType
from typing import Any

from aiohttp import ClientConnectionResetError, web

from qjax.server import access_log
from qjax.server.errors import ApiError, internal_error

DONE = b"data: [DONE]\n\n"
# Line breaks to `str.splitlines`, which some clients cut the stream with, though legal inside a line of an event.
_SEPARATORS = str.maketrans({"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"})
encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(chunk: dict[str, Any]) -> bytes:
    text = encode_json(chunk)
    if not text.isascii():
        text = text.translate(_SEPARATORS)
    return f"data: {text}\n\n".encode()


def named_event(chunk: dict[str, Any]) -> bytes:
    """An event that goes by its type, as in OpenAI's Responses and Anthropic's Messages."""
    return f"event: {chunk['type']}\n".encode() + event(chunk)


async def stream(
    request: web.Request,
    chunks: AsyncGenerator[dict[str, Any], None],
    headers: Mapping[str, str] = MappingProxyType({}),
    encode: Callable[[dict[str, Any]], bytes] = event,
    end: bytes = DONE,
) -> web.StreamResponse:
    """Sends chunks as they come.

    The first is awaited before the status goes out: a request that the engine refuses gets its 400, not a 200.

    Raises:
      ApiError: the request failed before its first chunk.
    """
    async with contextlib.aclosing(chunks):
        first = await anext(chunks)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # a proxy would collect the chunks
                **headers,
            }
        )
        try:
            await response.prepare(request)
            await response.write(encode(first))
            await _send_rest(response, chunks, encode)
            if end:
                await response.write(end)
            await response.write_eof()
        except ClientConnectionResetError:  # the client has gone; the request ends with us
            access_log.current().is_gone = True
    return response


async def _send_rest(
    response: web.StreamResponse,
    chunks: AsyncGenerator[dict[str, Any], None],
    encode: Callable[[dict[str, Any]], bytes],
) -> None:
    try:
        async for chunk in chunks:
            await response.write(encode(chunk))
    except ClientConnectionResetError:
        raise
    except ApiError as error:
        await response.write(event(error.body))
    except Exception as error:
        await response.write(event(internal_error(error).body))

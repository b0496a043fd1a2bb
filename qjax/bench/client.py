"""One streamed request to a server with OpenAI's API, and when its tokens came."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Answer:
    """What came of a request. Times are in seconds; `error` is empty where it was answered.

    Attributes:
      start: when it was sent, by `time.perf_counter`.
      ttft: from there to the first token.
      itls: between the tokens after it (between chunks, where a server sends several at once).
      latency: from the start to the last token.
      queue_time: between its arrival here and `start`, while `max_concurrency` others were running.
      output_len: tokens, as the server counted them; None where it does not.
    """

    prompt_len: int
    start: float = 0.0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    queue_time: float = 0.0
    output_len: int | None = None
    text: str = ""
    error: str = ""


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any], prompt_len: int) -> Answer:
    """Sends a request and reads its stream to the end. Failures are in the answer, not raised."""
    answer = Answer(prompt_len, start=time.perf_counter())
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status} {response.reason}: {(await response.text()).strip()}"
                return answer
            await _read(response, answer)
    except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: no JSON, or a line without an end
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def _read(response: aiohttp.ClientResponse, answer: Answer) -> None:
    latest = 0.0
    async for line in response.content:
        data = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        chunk = json.loads(data)
        if error := chunk.get("error"):
            answer.error = str(error.get("message", error) if isinstance(error, dict) else error)
            return
        if usage := chunk.get("usage"):
            answer.output_len = usage.get("completion_tokens", answer.output_len)
            answer.prompt_len = usage.get("prompt_tokens", answer.prompt_len)
        text = _text(chunk)
        if text is None:
            continue
        now = time.perf_counter()
        if latest:
            answer.itls.append(now - latest)
        else:
            answer.ttft = now - answer.start
        latest = now
        answer.latency = now - answer.start
        answer.text += text
    if not latest:
        answer.error = "the stream ended without a token"


def _text(chunk: dict[str, Any]) -> str | None:
    """The new text of a chunk; None where it is no token: a role, an end, or the usage."""
    if not chunk.get("choices"):
        return None
    choice = chunk["choices"][0]
    if "delta" not in choice:
        return choice.get("text") or ""
    delta = choice["delta"]
    calls = [call.get("function", {}).get("arguments") or "" for call in delta.get("tool_calls") or []]
    text = (delta.get("content") or "") + (delta.get("reasoning") or delta.get("reasoning_content") or "")
    return (text + "".join(calls)) or None

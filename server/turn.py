"""`Turn`: one answer to a conversation as the parser's events, and how an endpoint with objects of its own writes them.

Responses and Messages are made of it. They turn their requests into a `ChatRequest`, so prompt, checks and parsing are
chat's; chat's own objects are made in `chat`.
"""

import contextlib
import dataclasses
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from aiohttp import web

from qjax.sampling_params import SamplingParams
from qjax.server import sse
from qjax.server.chat import render
from qjax.server.choices import Choice
from qjax.server.errors import ApiError, internal_error, unavailable
from qjax.server.generation import Prompt, generate
from qjax.server.protocol import ChatRequest
from qjax.server.state import ServerState
from qjax.text.parsed import Event, Reasoning


@dataclasses.dataclass
class Turn:
    """One answer on its way.

    Attributes:
      num_output: tokens written so far; `num_cached`, of the prompt, is known with the first events.
      finish_reason: chat's; known with the last events. `stop_reason`: the stop string or token id.
    """

    state: ServerState
    body: ChatRequest
    prompt: Prompt
    params: SamplingParams
    request_id: str
    num_cached: int = 0
    num_output: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self._choice = Choice(self.state.config, self.body, self.prompt.text or "", self.state.engine.tokenizer)

    @classmethod
    async def prepare(cls, state: ServerState, body: ChatRequest, request_id: str) -> "Turn":
        """Renders and checks.

        Raises:
          ApiError: 400, the conversation or a value is wrong.
        """
        prompt = await render(state, body)
        return cls(state, body, prompt, body.sampling_params(state.engine.default_sampling_params), request_id)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def num_reasoning(self) -> int:
        return self._choice.num_reasoning

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """What each of the engine's deltas brings, perhaps nothing. Closing it early aborts the request.

        Raises:
          ApiError: at the first step where the request cannot be served; later where the engine failed or stopped.
        """
        outputs = generate(self.state, self.body, [self.prompt], self.params, self.request_id)
        async with contextlib.aclosing(outputs):
            async for _, output in outputs:
                self.num_cached = output.num_cached_tokens
                for delta in output.outputs:  # of one answer
                    if delta.finish_reason == "abort":
                        raise unavailable("The server stopped before the answer was complete.")
                    self.num_output += len(delta.token_ids)
                    self._choice.count(delta)
                    events = self._choice.events(delta)
                    if delta.is_finished:
                        self.finish_reason = self._choice.finish_reason(delta)
                        self.stop_reason = delta.stop_reason
                    yield [e for e in events if self.body.include_reasoning or not isinstance(e, Reasoning)]


class Writer(Protocol):
    """Makes an endpoint's stream of a turn, and the whole answer: `result`, after `end`."""

    def begin(self) -> list[dict[str, Any]]: ...
    def add(self, event: Event) -> list[dict[str, Any]]: ...
    def end(self) -> list[dict[str, Any]]: ...
    def fail(self, error: ApiError) -> list[dict[str, Any]]: ...

    @property
    def result(self) -> dict[str, Any]: ...


async def answer(
    request: web.Request, turn: Turn, writer: Writer, headers: Mapping[str, str] = MappingProxyType({})
) -> web.StreamResponse:
    """The whole answer, or its stream if the request wants one; both are the same writer's."""
    if turn.body.stream:
        return await sse.stream(request, _stream(turn, writer), headers, sse.named_event, end=b"")
    writer.begin()
    async with contextlib.aclosing(turn.events()) as batches:
        async for events in batches:
            for event in events:
                writer.add(event)
    writer.end()
    return web.json_response(writer.result, headers=headers, dumps=sse.encode_json)


async def _stream(turn: Turn, writer: Writer) -> AsyncGenerator[dict[str, Any], None]:
    """A failure is raised before the first chunk, and is the last chunk after it."""
    has_begun = False
    async with contextlib.aclosing(turn.events()) as batches:
        try:
            async for events in batches:
                if not has_begun:
                    has_begun = True
                    for chunk in writer.begin():
                        yield chunk
                for event in events:
                    for chunk in writer.add(event):
                        yield chunk
            for chunk in writer.end():
                yield chunk
        except Exception as error:
            if not has_begun:
                raise
            for chunk in writer.fail(error if isinstance(error, ApiError) else internal_error(error)):
                yield chunk


@contextlib.contextmanager
def field_names(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about chat's fields get the names that the endpoint's own request has for them."""
    try:
        yield
    except ApiError as error:
        message = str(error)
        for name, own in names.items():
            if name == error.param or "_" in name:  # "stop" is a word of English too
                message = re.sub(rf"\b{name}\b", own, message)
        param = names.get(error.param or "", error.param)
        raise ApiError(error.status, message, param=param, type=error.type, headers=error.headers) from error

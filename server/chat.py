"""POST /v1/chat/completions: conversation in, message out, whole or in chunks."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from qjax.outputs import CompletionOutput, RequestOutput
from qjax.sampling_params import SamplingParams
from qjax.server import sse
from qjax.server.answers import TokenNames, chat_logprobs, prompt_logprobs_json, usage
from qjax.server.errors import from_value_error
from qjax.server.generation import LONG_TEXT, Answer, Outputs, Prompt, answer_id, encode, generate, read_json, truncate
from qjax.server.protocol import ChatRequest
from qjax.server.schema import parse
from qjax.server.state import STATE, ServerState
from qjax.server.version import FINGERPRINT
from qjax.text.messages import template_messages


async def chat_completions(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    body = parse(ChatRequest, await read_json(request))
    model = state.check_model(body.model)
    request_id = answer_id(request, body, "chatcmpl")
    prompt = await render(state, body)
    params = body.sampling_params(state.engine.default_sampling_params)
    chat = Chat(state, body, prompt, params, model, request_id)
    outputs = generate(state, body, [prompt], params, request_id)
    headers = {"X-Request-Id": request_id}
    if body.stream:
        return await sse.stream(request, chat.chunks(outputs), headers)
    return web.json_response(await chat.whole(outputs), headers=headers, dumps=sse.encode_json)


async def render(state: ServerState, body: ChatRequest) -> Prompt:
    """The conversation as the model reads it, by the chat template."""
    add_prompt = body.add_generation_prompt
    variables = {**state.config.default_chat_template_kwargs, **(body.chat_template_kwargs or {})}

    def template() -> str:
        return state.engine.tokenizer.apply_chat_template(
            body.messages,
            tools=None if body.tool_choice == "none" else body.tools,
            chat_template=state.chat_template,
            add_generation_prompt=not body.continue_final_message if add_prompt is None else add_prompt,
            continue_final_message=body.continue_final_message,
            **variables,
        )

    contents = [m.get("content") or "" for m in body.messages]
    is_long = not all(isinstance(c, str) for c in contents) or sum(map(len, contents)) > LONG_TEXT
    try:
        text = await asyncio.to_thread(template) if is_long else template()
    except ValueError as error:
        raise from_value_error(error, ("messages", "chat_template_kwargs")) from None
    return Prompt(truncate(state, body, await encode(state, text, body.add_special_tokens)), text)


@dataclass
class Chat:
    """One chat request's way from the engine's deltas to OpenAI's objects.

    Where text becomes a message (`message`) or a delta (`_delta_chunk`), parsers for reasoning and tool calls will sit.
    """

    state: ServerState
    body: ChatRequest
    prompt: Prompt
    params: SamplingParams
    model: str
    request_id: str
    created: int = field(default_factory=lambda: int(time.time()))
    num_completion: int = 0
    num_cached: int = 0

    def __post_init__(self) -> None:
        self.names = TokenNames(self.state.engine.tokenizer, self.body.return_tokens_as_token_ids)

    # The whole answer

    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        answers = [Answer() for _ in range(self.params.n)]
        prompt_logprobs = None
        async with contextlib.aclosing(outputs):
            async for _, output in outputs:
                self._count(output)
                prompt_logprobs = output.prompt_logprobs or prompt_logprobs
                for delta in output.outputs:
                    answers[delta.index].add(delta)
        response = self._object("chat.completion")
        response["choices"] = [self._choice(i, answer) for i, answer in enumerate(answers)]
        response["usage"] = self._usage()
        if self.params.prompt_logprobs is not None:
            response["prompt_logprobs"] = prompt_logprobs_json(prompt_logprobs, self.state.engine.tokenizer)
        return response

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": self._echo() + answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.token_ids, answer.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    # Chunks

    async def chunks(self, outputs: Outputs) -> AsyncGenerator[dict[str, Any], None]:
        """A role chunk for each choice, deltas, a finish chunk for each choice, and the usage if asked for."""
        is_first = True
        async with contextlib.aclosing(outputs):
            async for _, output in outputs:
                if is_first:
                    self.num_cached = output.num_cached_tokens
                    for index in range(self.params.n):
                        yield self._role_chunk(index)
                    is_first = False
                self._count(output)
                for delta in output.outputs:
                    if delta.text or (delta.token_ids and self._shows_tokens):
                        yield self._delta_chunk(delta)
                    if delta.is_finished:
                        yield self._finish_chunk(delta)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield {**self._object("chat.completion.chunk", is_first=False), "choices": [], "usage": self._usage()}

    @property
    def _shows_tokens(self) -> bool:
        return self.body.logprobs or self.body.return_token_ids

    def _role_chunk(self, index: int) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": self._echo()}}, is_first=True)

    def _delta_chunk(self, delta: CompletionOutput) -> dict[str, Any]:
        choice = {
            "index": delta.index,
            "delta": {"content": delta.text},
            "logprobs": self._logprobs(delta.token_ids, delta.logprobs),
        }
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return self._chunk(choice)

    def _finish_chunk(self, delta: CompletionOutput) -> dict[str, Any]:
        choice = {"index": delta.index, "delta": {}}
        return self._chunk(choice, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)

    def _chunk(self, choice: dict[str, Any], is_first: bool = False, **end: Any) -> dict[str, Any]:
        chunk = self._object("chat.completion.chunk", is_first)
        chunk["choices"] = [{"logprobs": None, "finish_reason": None, **choice, **end}]
        options = self.body.stream_options
        if options and options.continuous_usage_stats:
            chunk["usage"] = self._usage()
        elif options and options.include_usage:
            chunk["usage"] = None
        return chunk

    # Both

    def _object(self, kind: str, is_first: bool = True) -> dict[str, Any]:
        head: dict[str, Any] = {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }
        if is_first and self.body.return_token_ids:
            head["prompt_token_ids"] = self.prompt.token_ids
        if is_first and self.body.return_prompt_text:
            head["prompt_text"] = self.prompt.text
        return head

    def _count(self, output: RequestOutput) -> None:
        self.num_cached = output.num_cached_tokens
        self.num_completion += sum(len(delta.token_ids) for delta in output.outputs)

    def _usage(self) -> dict[str, Any]:
        return usage(len(self.prompt.token_ids), self.num_completion, self.num_cached)

    def _echo(self) -> str:
        """With `echo`, the last message's text comes first if it is the assistant's: the part that was continued."""
        last = self.body.messages[-1]
        if not self.body.echo or last.get("role") != "assistant":
            return ""
        return template_messages([last])[0]["content"]

    def _logprobs(self, token_ids: list[int], logprobs: Any) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(token_ids, logprobs or [], self.body.top_logprobs or 0, self.names)

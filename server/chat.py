"""POST /v1/chat/completions: conversation in, message out, whole or in chunks."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from qjax.outputs import CompletionOutput, RequestOutput
from qjax.sampling_params import SamplingParams
from qjax.server import sse
from qjax.server.answers import TokenNames, chat_logprobs, prompt_logprobs_json, usage
from qjax.server.choices import Choice
from qjax.server.errors import from_value_error
from qjax.server.generation import LONG_TEXT, Outputs, Prompt, answer_id, encode, generate, read_json, truncate
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
    if body.stream:
        return await sse.stream(request, chat.chunks(outputs))
    return web.json_response(await chat.whole(outputs), dumps=sse.encode_json)


async def render(state: ServerState, body: ChatRequest) -> Prompt:
    """The conversation as the model reads it, by the chat template."""
    add_prompt = body.add_generation_prompt
    variables = body.template_variables(state.config.default_chat_template_kwargs)

    def template() -> str:
        return state.engine.tokenizer.apply_chat_template(
            body.messages,
            tools=body.shown_tools,
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
    """One chat request's way from the engine's deltas to OpenAI's objects. What each answer says is `Choice`'s part."""

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
        tokenizer, config = self.state.engine.tokenizer, self.state.config
        self.names = TokenNames(tokenizer, self.body.return_tokens_as_token_ids)
        text = self.prompt.text or ""
        if self.body.truncate_prompt_tokens is not None:  # the model may not have seen the text's end
            text = tokenizer.decode(self.prompt.token_ids, skip_special_tokens=False)
        self.choices = [Choice(config, self.body, text, tokenizer) for _ in range(self.params.n)]

    # The whole answer

    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        prompt_logprobs = None
        async with contextlib.aclosing(outputs):
            async for _, output in outputs:
                self._count(output)
                prompt_logprobs = output.prompt_logprobs or prompt_logprobs
                for delta in output.outputs:
                    self.choices[delta.index].answer.add(delta)
        response = self._object("chat.completion")
        response["choices"] = [self._choice(i, choice) for i, choice in enumerate(self.choices)]
        response["usage"] = self._usage()
        if self.params.prompt_logprobs is not None:
            response["prompt_logprobs"] = prompt_logprobs_json(prompt_logprobs, self.state.engine.tokenizer)
        return response

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        answer = choice.answer.build()
        out = {
            "index": index,
            "message": choice.message(answer, self._echo()),
            "logprobs": self._logprobs(answer.token_ids, answer.logprobs),
            "finish_reason": choice.finish_reason(answer),
            "stop_reason": answer.stop_reason,
        }
        if self.body.return_token_ids:
            out["token_ids"] = answer.token_ids
        return out

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
                    for chunk in self._delta_chunks(delta):
                        yield chunk
                    if delta.is_finished:
                        yield self._finish_chunk(delta)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield {**self._object("chat.completion.chunk", is_first=False), "choices": [], "usage": self._usage()}

    @property
    def _shows_tokens(self) -> bool:
        return self.body.logprobs or self.body.return_token_ids

    def _role_chunk(self, index: int) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": self._echo()}}, is_first=True)

    def _delta_chunks(self, delta: CompletionOutput) -> Iterator[dict[str, Any]]:
        """None, where the text waits for what comes next; several where it is of several kinds, the first with the
        logprobs and token ids.
        """
        deltas = self.choices[delta.index].deltas(delta)
        if not deltas and delta.token_ids and self._shows_tokens:
            deltas = [{}]
        for i, content in enumerate(deltas):
            choice: dict[str, Any] = {"index": delta.index, "delta": content}
            if i == 0:
                choice["logprobs"] = self._logprobs(delta.token_ids, delta.logprobs)
                if self.body.return_token_ids:
                    choice["token_ids"] = delta.token_ids
            yield self._chunk(choice)

    def _finish_chunk(self, delta: CompletionOutput) -> dict[str, Any]:
        reason = self.choices[delta.index].finish_reason(delta)
        return self._chunk({"index": delta.index, "delta": {}}, finish_reason=reason, stop_reason=delta.stop_reason)

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
        for delta in output.outputs:
            self.num_completion += len(delta.token_ids)
            self.choices[delta.index].count(delta)

    def _usage(self) -> dict[str, Any]:
        num_reasoning = sum(choice.num_reasoning for choice in self.choices)
        return usage(len(self.prompt.token_ids), self.num_completion, self.num_cached, num_reasoning)

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

"""POST /v1/completions: text or token ids in, their continuation out, whole or in chunks."""

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from qjax.outputs import CompletionBuilder, CompletionOutput, Logprob, RequestOutput
from qjax.sampling_params import SamplingParams
from qjax.server import sse
from qjax.server.answers import CompletionLogprobs, TokenNames, prompt_logprobs_json, usage
from qjax.server.generation import Outputs, Prompt, answer_id, encode, generate, read_json, truncate
from qjax.server.protocol import CompletionRequest
from qjax.server.schema import parse
from qjax.server.state import STATE, ServerState
from qjax.server.version import FINGERPRINT


async def completions(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    body = parse(CompletionRequest, await read_json(request))
    model = state.check_model(body.model)
    request_id = answer_id(request, body, "cmpl")
    prompts = [await read_prompt(state, body, prompt) for prompt in body.prompts()]
    params = body.sampling_params(state.engine.default_sampling_params)
    completion = Completion(state, body, prompts, params, model, request_id)
    outputs = generate(state, body, prompts, params, request_id)
    if body.stream:
        return await sse.stream(request, completion.chunks(outputs))
    return web.json_response(await completion.whole(outputs), dumps=sse.encode_json)


async def read_prompt(state: ServerState, body: CompletionRequest, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, list):
        return Prompt(truncate(state, body, prompt))
    add_special_tokens = True if body.add_special_tokens is None else body.add_special_tokens
    token_ids = await encode(state, prompt, add_special_tokens)
    kept = truncate(state, body, token_ids)
    return Prompt(kept, prompt if len(kept) == len(token_ids) else None)


@dataclass
class Completion:
    """One request's way from the engine's deltas to OpenAI's objects. Choice k is answer k % n of prompt k // n."""

    state: ServerState
    body: CompletionRequest
    prompts: list[Prompt]
    params: SamplingParams
    model: str
    request_id: str
    created: int = field(default_factory=lambda: int(time.time()))
    num_completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # prompt -> tokens found in the prefix cache

    def __post_init__(self) -> None:
        tokenizer = self.state.engine.tokenizer
        names = TokenNames(tokenizer, self.body.return_tokens_as_token_ids)
        num_top = self.params.logprobs if self.params.logprobs is not None else 0
        self.logprobs = [
            CompletionLogprobs(tokenizer, names, num_top, self.params.skip_special_tokens)
            for _ in range(len(self.prompts) * self.params.n)
        ]

    # The whole answer

    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        answers = [CompletionBuilder() for _ in self.logprobs]
        prompt_logprobs: dict[int, Any] = {}
        async with contextlib.aclosing(outputs):
            async for i, output in outputs:
                self._count(i, output)
                if output.prompt_logprobs is not None:
                    prompt_logprobs[i] = output.prompt_logprobs
                for delta in output.outputs:
                    answers[self._choice_index(i, delta)].add(delta)
        response = self._object()
        response["choices"] = [
            self._choice(k, answer.build(), prompt_logprobs.get(k // self.params.n)) for k, answer in enumerate(answers)
        ]
        response["usage"] = self._usage()
        return response

    def _choice(self, k: int, answer: CompletionOutput, prompt_logprobs: Any) -> dict[str, Any]:
        prompt = self.prompts[k // self.params.n]
        token_ids = [] if self.body.is_echo_only else answer.token_ids
        choice = {
            "index": k,
            "text": self._echo(k) + ("" if self.body.is_echo_only else answer.text),
            "logprobs": self._logprobs(k, token_ids, answer.logprobs or [], prompt_logprobs, is_first=True),
            "finish_reason": "length" if self.body.is_echo_only else answer.finish_reason,
            "stop_reason": None if self.body.is_echo_only else answer.stop_reason,
        }
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_json(prompt_logprobs, self.state.engine.tokenizer)
        if self.body.return_token_ids:
            choice["token_ids"] = token_ids
            choice["prompt_token_ids"] = prompt.token_ids
        return choice

    # Chunks

    async def chunks(self, outputs: Outputs) -> AsyncGenerator[dict[str, Any], None]:
        """Deltas, the first of a choice with the echoed prompt; the last has the finish reason; then the usage."""
        begun: set[int] = set()
        async with contextlib.aclosing(outputs):
            async for i, output in outputs:
                self._count(i, output)
                for delta in output.outputs:
                    k = self._choice_index(i, delta)
                    is_first = k not in begun
                    begun.add(k)
                    shows_tokens = self.params.logprobs is not None or self.body.return_token_ids
                    if is_first or delta.text or delta.is_finished or (delta.token_ids and shows_tokens):
                        yield self._delta_chunk(k, delta, output, is_first)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield {**self._object(), "choices": [], "usage": self._usage()}

    def _delta_chunk(self, k: int, delta: CompletionOutput, output: RequestOutput, is_first: bool) -> dict[str, Any]:
        is_echo_only = self.body.is_echo_only
        token_ids = [] if is_echo_only else delta.token_ids
        choice = {
            "index": k,
            "text": (self._echo(k) if is_first else "") + ("" if is_echo_only else delta.text),
            "logprobs": self._logprobs(k, token_ids, delta.logprobs or [], output.prompt_logprobs, is_first),
            "finish_reason": "length" if is_echo_only and delta.is_finished else delta.finish_reason,
            "stop_reason": None if is_echo_only else delta.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = token_ids
            if is_first:
                choice["prompt_token_ids"] = self.prompts[k // self.params.n].token_ids
        chunk = {**self._object(), "choices": [choice]}
        options = self.body.stream_options
        if options and options.continuous_usage_stats:
            chunk["usage"] = self._usage()
        elif options and options.include_usage:
            chunk["usage"] = None
        return chunk

    # Both

    def _object(self) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _choice_index(self, i: int, delta: CompletionOutput) -> int:
        return i * self.params.n + delta.index

    def _count(self, i: int, output: RequestOutput) -> None:
        self.cached[i] = output.num_cached_tokens
        if not self.body.is_echo_only:
            self.num_completion += sum(len(delta.token_ids) for delta in output.outputs)

    def _usage(self) -> dict[str, Any]:
        num_prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        return usage(num_prompt, self.num_completion, sum(self.cached.values()))

    def _echo(self, k: int) -> str:
        if not self.body.echo:
            return ""
        prompt = self.prompts[k // self.params.n]
        if prompt.text is not None:
            return prompt.text
        return self.state.engine.tokenizer.decode(prompt.token_ids, skip_special_tokens=self.params.skip_special_tokens)

    def _logprobs(
        self,
        k: int,
        token_ids: list[int],
        logprobs: list[dict[int, Logprob]],
        prompt_logprobs: list[dict[int, Logprob] | None] | None,
        is_first: bool,
    ) -> dict[str, Any] | None:
        if self.params.logprobs is None:
            return None
        if not (self.body.echo and is_first):
            return self.logprobs[k].add(token_ids, logprobs)
        prompt_ids = self.prompts[k // self.params.n].token_ids
        known = prompt_logprobs or [None] * len(prompt_ids)
        return self.logprobs[k].add(prompt_ids + token_ids, [*known, *logprobs])

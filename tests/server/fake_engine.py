"""An engine without a model: the interface of `AsyncEngine`, with answers that a test chooses.

Run as a program it is a server for the tests of signals and of the engine's death.
"""

import asyncio
import logging
import math
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable

from qjax.config import ServerConfig
from qjax.outputs import CompletionOutput, Logprob, RequestOutput
from qjax.sampling_params import SamplingParams
from qjax.text.detokenizer import Detokenizer
from qjax.text.tokenizer import Tokenizer


class EngineDeadError(RuntimeError):
    pass


class FakeEngine:
    """Answers each request with `answer(prompt_text, params, index)`, one token each `delay` seconds.

    Attributes:
      calls: what `generate` was called with: (request_id, prompt ids, params, priority, cache_salt).
      ends: request id -> "finished", "aborted" (by `abort`) or "closed" (the iterator was closed early).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        answer: Callable[[str, SamplingParams, int], str] | None = None,
        delay: float = 0.0,
        max_model_len: int = 256,
        phases: list[str] | None = None,
        defaults: dict | None = None,
    ):
        self.tokenizer = tokenizer
        self._answer = answer or (lambda prompt, params, index: f"Hello from answer {index}.")
        self._delay = delay
        self._phases = phases or []
        self.phase = "loading"
        self.error: BaseException | None = None
        self.max_model_len = max_model_len
        self.max_logprobs = 20
        self.vocab_size = 520  # padded beyond the tokenizer's 512
        self.model_name = "org/fake-model"
        self.pooling_kind = None
        self.default_sampling_params = defaults or {}
        self.calls: list[tuple] = []
        self.ends: dict[str, str] = {}
        self.fail_after: int | None = None  # tokens until the engine dies
        self.error_after: int | None = None  # tokens until a request ends with "error"
        self.error_stop_reason: str | None = None
        self.start_error: Exception | None = None
        self.go_on = asyncio.Event()  # start-up waits for it in each phase
        self.num_tokens = 0  # written so far, of all requests
        self.num_places = 256  # requests that run at a time, as `num_queued` says
        self.seconds_stalled = 0.0
        self.is_sleeping = False
        self._aborted: dict[str, asyncio.Event] = {}

    # Start and stop

    def start(self) -> None:
        self._loading = asyncio.ensure_future(self._load())

    async def _load(self) -> None:
        for phase in self._phases:
            self.phase = phase
            await self.go_on.wait()
            self.go_on.clear()
        if self.start_error is not None:
            self.phase, self.error = "failed", self.start_error
            raise self.start_error
        self.phase = "ready"

    async def wait_ready(self) -> None:
        await asyncio.shield(self._loading)

    async def shutdown(self, timeout: float = math.inf) -> bool:
        self.phase = "stopping"
        if self.seconds_stalled:
            return False
        for request_id in list(self._aborted):
            self.abort(request_id)
        return True

    def die(self) -> None:
        self.phase, self.error = "failed", RuntimeError("the GPU at /dev/secret fell off the bus")

    def render_metrics(self) -> bytes:
        return b"# HELP vllm:generation_tokens_total Tokens.\nvllm:generation_tokens_total 0.0\n"

    async def reset_prefix_cache(self, reset_external: bool) -> bool:
        self.reset_external = reset_external
        return not self._aborted

    async def sleep(self, level: int) -> None:
        if self.is_sleeping:
            raise ValueError("The engine sleeps (kv_cache, weights): wake_up comes first.")
        self.is_sleeping, self.sleep_level = True, level
        for request_id in list(self._aborted):
            self.abort(request_id)

    async def wake_up(self, tags: list[str] | None) -> None:
        self.is_sleeping = tags is not None and len(tags) < 2

    # Requests

    def num_queued(self, more: int = 0) -> int:
        return max(0, self.num_unfinished + more - self.num_places)

    @property
    def num_unfinished(self) -> int:
        return len(self._aborted)

    num_running = num_unfinished

    def abort(self, request_id: str) -> None:
        if request_id in self._aborted:
            self._aborted[request_id].set()

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        if self.error is not None:
            raise EngineDeadError(str(self.error))
        if request_id in self._aborted:
            raise ValueError(f"request_id {request_id!r} is in use by a running request.")
        wrong = [i for i in prompt_token_ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"prompt has the token id {wrong[0]}; the model's ids are 0 to {self.vocab_size - 1}.")
        await asyncio.sleep(0)
        if priority:
            raise ValueError(f"priority={priority} needs --scheduling-policy priority.")
        self.calls.append((request_id, prompt_token_ids, params, priority, cache_salt))
        aborted = self._aborted[request_id] = asyncio.Event()
        self.ends[request_id] = "closed"
        try:
            async for output in self._run(prompt_token_ids, params, request_id, aborted):
                if output.finished:
                    self.ends[request_id] = "aborted" if aborted.is_set() else "finished"
                yield output
        finally:
            del self._aborted[request_id]

    async def _run(self, prompt_ids, params, request_id, aborted) -> AsyncIterator[RequestOutput]:
        """The answers' tokens in turns, one of each at a time, as an engine's steps would give them."""
        prompt = self.tokenizer.decode(prompt_ids, skip_special_tokens=False)
        eos = self.tokenizer.eos_token_id
        waiting = [
            [*self.tokenizer.encode(self._answer(prompt, params, index)), eos][: params.max_tokens]
            for index in range(params.n)
        ]
        streams = [Detokenizer(self.tokenizer, params) for _ in waiting]
        live = list(range(params.n))
        step = 0
        while live:
            if self._delay:
                with_timeout = asyncio.wait_for(aborted.wait(), self._delay)
                await asyncio.gather(with_timeout, return_exceptions=True)
            await asyncio.sleep(0)
            if self.error is not None or step == self.fail_after:
                if self.error is None:
                    self.die()
                raise EngineDeadError(f"The engine has failed: {self.error}")
            step += 1
            for index in list(live):
                tokens, text, reason, stop = [], "", None, None
                if aborted.is_set():
                    reason = "abort"
                elif self.error_after is not None and step > self.error_after:
                    reason, stop = "error", self.error_stop_reason
                else:
                    token = waiting[index].pop(0)
                    tokens = [token]
                    self.num_tokens += 1
                    if token != eos:
                        text = streams[index].append(tokens)
                    if streams[index].stop_match is not None:
                        reason, stop = "stop", streams[index].stop_match
                    elif not waiting[index]:
                        reason = "stop" if token == eos else "length"
                if reason is not None:
                    text += streams[index].flush()
                    live.remove(index)
                delta = CompletionOutput(
                    index=index,
                    text=text,
                    token_ids=tokens,
                    logprobs=None if params.logprobs is None else [self._logprobs(t, params.logprobs) for t in tokens],
                    finish_reason=reason,
                    stop_reason=stop,
                )
                yield RequestOutput(
                    request_id=request_id,
                    prompt=None,
                    prompt_token_ids=prompt_ids,
                    outputs=[delta],
                    finished=not live,
                    prompt_logprobs=self._prompt_logprobs(prompt_ids, params.prompt_logprobs),
                    num_cached_tokens=len(prompt_ids) // 16 * 16,
                )

    def _prompt_logprobs(self, ids, num):
        return None if num is None else [None, *(self._logprobs(i, num) for i in ids[1:])]

    def _logprobs(self, token: int, num: int) -> dict[int, Logprob]:
        """The token itself, at rank 2 of the vocabulary; rank 3 cannot happen."""
        entries = {token: Logprob(math.log(0.25), 2)}
        others = [((token + 1) % 512, Logprob(math.log(0.75), 1)), ((token + 2) % 512, Logprob(-math.inf, 3))]
        entries.update(sorted([(token, entries[token]), *others], key=lambda e: e[1].rank)[:num])
        return entries


def main(folder: str, delay: str, *options: str) -> int:
    """A server of a fake engine that writes for ever. Options: `die` after 20 tokens, `load` for ever, `hang` in a
    step, `short` answers and every endpoint, a time-out in seconds, the path of a unix `.sock`.
    """
    from qjax.server.lifecycle import run_engine

    phases = ["loading the weights"] if "load" in options else []
    logging.basicConfig(level=logging.INFO)
    tokenizer = Tokenizer.from_pretrained(folder)
    answer = None if "short" in options else lambda *_: "word " * 10_000
    engine = FakeEngine(tokenizer, answer=answer, delay=float(delay), max_model_len=4096, phases=phases)
    if "hang" in options:
        engine.seconds_stalled = 1e6
        threading.Thread(target=threading.Event().wait).start()  # Python would wait for it
    engine.fail_after = 20 if "die" in options else None
    timeout = next((float(o) for o in options if o.replace(".", "").isdigit()), 30.0)
    uds = next((option for option in options if option.endswith(".sock")), None)
    is_dev = "short" in options
    config = ServerConfig(host="127.0.0.1", port=0, uds=uds, shutdown_timeout=timeout, server_dev_mode=is_dev)
    return run_engine(engine, config)


def run_forked(*arguments: str) -> None:
    """`main` in a fork: a session of its own, and an exit code."""
    os.setsid()
    sys.exit(main(*arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""`Engine`: requests in, deltas of text out. Its step is schedule → run → update → emit, one step ahead of the device.

Not thread-safe: one thread adds, aborts and steps. `AsyncEngine` and `LLM` are the two drivers of it.
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from qjax.config import EngineConfig
from qjax.engine.answers import Answer, Group, logprob_dict
from qjax.engine.block_pool import BlockPool
from qjax.engine.checking import check
from qjax.engine.ending import host_end
from qjax.engine.faults import Recovery, StepError
from qjax.engine.hosts import Followers
from qjax.engine.loading import Loaded, load, load_weights
from qjax.engine.lockstep import make_runner
from qjax.engine.logit_edits import bad_words_token_ids
from qjax.engine.metrics import Metrics
from qjax.engine.repetition import loop_detector
from qjax.engine.request import Request
from qjax.engine.runner import InFlight, Logprobs, StepResult
from qjax.engine.scheduler import Scheduler, SchedulerConfig
from qjax.engine.sleeping import TAGS, Sleeper
from qjax.engine.weights import update
from qjax.outputs import RequestOutput
from qjax.sampling_params import SamplingParams
from qjax.text.constraint import make_constraint
from qjax.text.detokenizer import Detokenizer
from qjax.text.grammar import GrammarCompiler

log = logging.getLogger("qjax")

# Requests that must be read before they go on take part in every second step as long as they are few: at most one in
# this many. If they are more, all wait for them, and the step in flight is read first.
MAX_HELD_BACK = 4


class Engine:
    """Loads a model and generates. `engine.pooling.make_engine` makes the kind of engine that a checkpoint is for.

    Args:
      config: see `EngineConfig`.
      progress: show progress bars while downloading, loading and compiling.
      on_phase: told what start-up is doing ("loading the weights", …).
      loaded: what `load` gave for this config, where that was called already.

    Raises:
      ValueError: a wrong option or checkpoint.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: bool = True,
        on_phase: Callable[[str], None] = lambda phase: None,
        loaded: Loaded | None = None,
    ):
        self.config = config
        loaded = loaded or load(config, progress=progress, on_phase=on_phase)
        self.pooling = loaded.pooling
        self.model_config = loaded.model_config
        self.tokenizer = loaded.tokenizer
        self.plan = loaded.plan
        self.default_sampling_params = loaded.generation_defaults
        self.eos_token_ids = loaded.eos_token_ids
        self.hosts = loaded.hosts
        self.runner = make_runner(loaded)
        where = (config, loaded.folder, loaded.model_config, loaded.mesh, jnp.dtype(self.plan.dtype))
        self.sleeper = Sleeper(self.runner, partial(load_weights, *where, progress=progress))
        self.pool = BlockPool(self.plan.num_pages, self.plan.page_size, config.enable_prefix_caching, loaded.host_cache)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=self.plan.max_num_seqs,
                max_num_batched_tokens=self.plan.max_num_batched_tokens,
                max_model_len=self.plan.max_model_len,
                max_num_prefills=self.plan.max_num_prefills,
                policy=config.scheduling_policy,
                num_steps=self.plan.num_scheduler_steps,
            ),
            self.pool,
        )
        self.recovery = Recovery(self.scheduler, self.runner)
        self.grammars = GrammarCompiler(self.tokenizer, self.model_config.vocab_size, self.eos_token_ids)
        self.metrics = Metrics(config.model, self.plan.max_model_len, loaded.host_cache)
        self._groups: dict[str, Group] = {}
        self._answers: dict[str, tuple[Group, Answer]] = {}  # by the sequence's own id
        self._flight: InFlight | None = None
        self._seeds = random.Random(config.seed)
        self.num_waiting = 0  # sequences that the last step had no place for
        if self.plan.is_gpu and not config.enforce_eager:
            on_phase("compiling")
            self.runner.compile_ahead([loaded.usual_options], progress=progress)
        self.runner.make_cache()

    @property
    def max_model_len(self) -> int:
        return self.plan.max_model_len

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do: unfinished requests, or a step whose output nobody has read."""
        return bool(self._groups) or self._flight is not None

    @property
    def request_ids(self) -> list[str]:
        return list(self._groups)

    @property
    def num_running(self) -> int:
        return self.scheduler.num_running

    # Requests in

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queues a request.

        Raises:
          ValueError: the request cannot be served; nothing was queued.
        """
        self.check_request(request_id, prompt_token_ids, params)
        if priority and self.config.scheduling_policy != "priority":
            raise ValueError(f"priority={priority} needs --scheduling-policy priority.")
        room = self.max_model_len - len(prompt_token_ids)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(64)
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        if params.structured_outputs is not None:
            self.grammars.compile(params.structured_outputs)  # before anything is queued: it may be refused
        bad_words = bad_words_token_ids(params.bad_words or [], self.tokenizer.encode)
        requests = [
            Request(
                request_id=request_id if params.n == 1 else f"{request_id}#{index}",
                prompt_token_ids=list(prompt_token_ids),
                params=params,
                max_tokens=min(params.max_tokens or room, room),
                eos_token_ids=eos,
                stop_token_ids=frozenset(params.stop_token_ids or []),
                seed=seed + index,
                constraint=make_constraint(self.grammars, prompt_token_ids, params),
                loops=loop_detector(params.repetition_detection),
                bad_words_token_ids=bad_words,
                arrival_time=time.monotonic(),
                priority=priority,
                cache_salt=cache_salt,
            )
            for index in range(params.n)
        ]
        make_detokenizer = lambda: Detokenizer(self.tokenizer, params) if params.detokenize else None
        answers = [Answer(request, index, make_detokenizer()) for index, request in enumerate(requests)]
        self._queue(Group(request_id, prompt, answers))

    def _queue(self, group: Group) -> None:
        """Raises ValueError if the scheduler refuses an answer; nothing was queued then."""
        requests = [answer.request for answer in group.answers]
        if taken := [r.request_id for r in requests if r.request_id in self._answers]:
            raise ValueError(f"request_id {taken[0]!r} is in use by a running request.")
        for request in requests:  # of one length: it refuses the first, or none
            self.scheduler.add(request)
        self._groups[group.request_id] = group
        self._answers |= {answer.request.request_id: (group, answer) for answer in group.answers}

    def check_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raises ValueError if the engine cannot serve this request."""
        self.sleeper.check_awake(*TAGS)
        if request_id in self._groups:
            raise ValueError(f"request_id {request_id!r} is in use by a running request.")
        check(
            prompt_token_ids,
            params,
            max_model_len=self.max_model_len,
            vocab_size=self.model_config.vocab_size,
            max_logprobs=self.config.max_logprobs,
        )

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request; its last delta says "abort". None if there is no such request (it may just have ended)."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        for answer in group.answers:
            if not answer.request.is_finished:
                self.scheduler.abort(answer.request.request_id)
                self._flush(answer)
        return self._emit(group)

    # The step

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step, then reads the one before it. Returns what is new, as deltas.

        The requests of a step that fails end with finish_reason "error" and stop_reason `STEP_FAILED`.

        Raises:
          RuntimeError: a broken invariant, or a device that does nothing any more.
        """
        try:
            touched = self._step()
        except StepError as failure:
            touched = self._recover(failure)
        self.num_waiting = self.scheduler.num_waiting
        self.metrics.on_step(running=self.scheduler.num_running, waiting=self.num_waiting, kv_usage=self.pool.usage)
        self.metrics.on_compiles(self.runner.compiles.count, self.runner.compiles.seconds)
        if not self.has_work:
            self.scheduler.check_integrity()
        return [output for group in touched if (output := self._emit(group)) is not None]

    def _step(self) -> dict[Group, None]:
        """Returns the groups that may have something new, in order."""
        touched: dict[Group, None] = {}
        before = self._flight
        if self.scheduler.num_held_back * MAX_HELD_BACK > self.scheduler.num_running:
            touched |= self._update()
        batch = self.scheduler.schedule()
        flight = None
        if not batch.is_empty:
            self.metrics.on_dispatch(is_late=before is not None and before.is_done)
            self.metrics.on_preempted(len(batch.preempted))
            try:
                flight = self.runner.dispatch(batch)
            except Exception as error:
                raise StepError(batch) from error
        touched |= self._update()
        self._flight = flight
        if flight is not None and self.recovery.is_short:
            self.recovery.on_good_step()
        return touched

    def _recover(self, failure: StepError) -> dict[Group, None]:
        """Ends whom the failure concerns. Returns all groups: some may have got something just before it."""
        if isinstance(self.hosts, Followers):
            raise self.hosts.failure(failure.__cause__) from failure.__cause__
        try:
            self._update()  # the step before may have ended well; if it has not, that is where it began
        except StepError as earlier:
            failure = earlier
        groups = dict.fromkeys(self._groups.values())
        for request in self.recovery.after(failure):
            self._flush(self._answers[request.request_id][1])
        self.metrics.on_failure()
        return groups

    def _collect(self, flight: InFlight) -> StepResult:
        try:
            return self.runner.collect(flight)
        except Exception as error:
            raise StepError(flight.batch) from error

    def _update(self) -> dict[Group, None]:
        """Reads the step in flight, if there is one. Returns the groups that have something new, in order."""
        flight, self._flight = self._flight, None
        if flight is None:
            return {}
        result = self._collect(flight)
        touched: dict[Group, None] = {}
        for i, rows in result.prompt_logprobs.items():
            chunk = flight.batch.prefills[i]
            if (id := chunk.request.request_id) in self._answers:
                self._answers[id][0].add_prompt_logprobs(chunk.request, chunk.start, rows, self.tokenizer)
        sampled = {}
        for i, chunk in enumerate(flight.batch.sampling):
            if result.logprobs is not None and chunk.request.params.logprobs is not None:
                sampled[chunk.request] = result.logprobs[i]
        for token_ids in result.token_ids:
            self._take(flight, token_ids, sampled, touched)
        return touched

    def _take(
        self, flight: InFlight, token_ids: list[int], sampled: dict[Request, Logprobs], touched: dict[Group, None]
    ) -> None:
        """Gives each request of a step its token, unless it has ended."""
        accepted = dict(self.scheduler.update(flight.batch, token_ids))
        self.metrics.on_tokens([request for request, token in accepted.items() if token >= 0])
        for chunk in flight.batch.sampling:
            if chunk.request.request_id not in self._answers:
                continue
            group, answer = self._answers[chunk.request.request_id]
            if answer.request is not chunk.request or answer.is_reported:
                continue
            if accepted.get(chunk.request, -1) >= 0:
                try:
                    self._append(answer, accepted[chunk.request], sampled.get(chunk.request))
                except Exception:  # a bug, or a grammar's: of this answer alone
                    self._give_up(answer)
            elif chunk.request in accepted:
                log.error("request %s: not a number came out: are the weights whole?", chunk.request.request_id)
            if chunk.request.is_finished and chunk.request in accepted:
                self._flush(answer)
            touched[group] = None

    def _append(self, answer: Answer, token_id: int, logprobs: Logprobs | None) -> None:
        """Adds a token to an answer's delta, and ends the answer where a stop string completes."""
        request, params = answer.request, answer.request.params
        answer.token_ids.append(token_id)
        if (end := host_end(request, token_id)) is not None:
            self.scheduler.finish(request, *end)
            request.finish_reason, request.stop_reason = end
        if logprobs is not None and params.logprobs is not None:
            answer.cumulative_logprob += logprobs.logprob
            answer.logprobs.append(logprob_dict(token_id, logprobs, params.logprobs, self.tokenizer))
        ended_by_id = request.is_finished and token_id in request.stop_token_ids | request.eos_token_ids
        if answer.detokenizer is None or (ended_by_id and not params.include_stop_str_in_output):
            return
        can_stop = len(request.output_token_ids) >= params.min_tokens
        answer.text += answer.detokenizer.append([token_id], can_stop)
        if answer.detokenizer.stop_match is not None:
            self.scheduler.finish(request, "stop", answer.detokenizer.stop_match)
            # Also where the same token was the last by max_tokens: the text ends by the stop string.
            request.finish_reason, request.stop_reason = "stop", answer.detokenizer.stop_match

    def _give_up(self, answer: Answer) -> None:
        """Ends an answer in whose token something raised."""
        request = answer.request
        log.exception("request %s failed", request.request_id, extra={"request_ids": [request.request_id]})
        answer.detokenizer = None
        self.scheduler.finish(request, "error")
        request.finish_reason = "error"

    def _flush(self, answer: Answer) -> None:
        """The answer has ended."""
        self.metrics.on_end(answer.request)
        if answer.detokenizer is not None:
            answer.text += answer.detokenizer.flush()

    # Deltas out

    def _emit(self, group: Group) -> RequestOutput | None:
        """What is new in a request since the last call; forgets the request once all has been said."""
        output = group.take()
        if group.is_reported:
            del self._groups[group.request_id]
            for answer in group.answers:
                del self._answers[answer.request.request_id]
        return output

    def reset_prefix_cache(self, reset_external: bool = False) -> bool:
        """Forgets all cached pages, or also the host's copies of them. False while requests hold some."""
        return self.pool.reset_prefix_cache(reset_external)

    def update_weights(self, params: Sequence[jax.Array]) -> None:
        """Puts other weights into the running engine, on the devices; forgets the prefix cache made with the old ones.

        Args:
          params: the model's leaves in the order of `ModelDef.paths`, in any floating dtype; copied.

        Raises:
          ValueError: requests run, or an array has another shape than the model's.
        """
        self._settle("update_weights", "their answers would be of two models")
        self.sleeper.check_awake("weights")
        update(self.runner, params)
        self.reset_prefix_cache(reset_external=True)

    def sleep(self, level: int = 1) -> None:
        """Gives the devices' memory back. Level 1 keeps the weights in the host's memory, level 2 does not.

        Raises:
          ValueError: requests run, or the engine sleeps already.
        """
        self._settle("sleep", "they would lose their KV cache")
        self.sleeper.sleep(level)
        self.reset_prefix_cache()

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Puts back what `sleep` took, or only "weights" or "kv_cache"; after level 2 the checkpoint is read again."""
        self.sleeper.wake_up(tags)

    def _settle(self, what: str, why: str) -> None:
        """Reads what is in flight. Raises ValueError if requests run, or other hosts would have to do the same."""
        if self.hosts is not None:
            raise ValueError(f"{what} is not supported with several hosts (--nnodes).")
        if self.has_unfinished:
            raise ValueError(f"{what}: {len(self._groups)} request(s) run; {why}. Wait for them or abort them first.")
        while self.has_work:
            self.step()

"""Which tokens each step computes: continuous batching, chunked prefill, prefix reuse, preemption. No jax.

The scheduler runs ahead of the device: `schedule` for step n + 1 is called before `update` brings the tokens that
step n sampled. What it decides on is therefore counts (`num_computed_tokens`, `num_pending`), which it knows when
it schedules, never the value of a token still on the device.

Continuous batching is Yu et al., 2022 (Orca); chunked prefill beside decodes is Agrawal et al., 2024 (Sarathi-Serve).
"""

import heapq
import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qjax.engine.block_pool import BlockPool, hash_page
from qjax.engine.logit_edits import is_held_back
from qjax.engine.request import Request, RequestStatus
from qjax.engine.scheduled import ScheduledBatch, ScheduledChunk
from qjax.outputs import FinishReason


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of a request.

    Args:
      max_num_seqs: requests that run at a time; slots are 0 to max_num_seqs - 1.
      max_num_batched_tokens: tokens in one step, decodes and prefill chunks together.
      max_model_len: prompt and output tokens of a request.
      max_num_prefills: prefill chunks in one step.
      policy: order of waiting requests: by arrival, or by (priority, arrival).
      num_steps: decode steps that are sent to the device at once, where that disturbs nobody; at most a page's tokens.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_prefills: int = 8
    policy: Literal["fcfs", "priority"] = "fcfs"
    num_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_num_prefills", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.policy not in ("fcfs", "priority"):
            raise ValueError(f"scheduling_policy must be fcfs or priority, got {self.policy!r}.")


class Scheduler:
    """Queues of requests, and the pages and slots they hold.

    Pages and slots are given back at once, even while a step that uses them is in flight: the device runs steps in
    order, so whoever gets them next writes after that step has read and written them. By the same order a page may
    be registered in the prefix cache as soon as the step that fills it is dispatched.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        # A request alone in the pool must be able to reach its end, or it would preempt itself for ever.
        self.max_model_len = min(config.max_model_len, pool.num_usable * pool.page_size)
        self.waiting: list[Request] = []  # both queues in the order of `_rank`
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}  # those not finished
        self._free_slots = list(range(config.max_num_seqs))  # a heap: low slots first
        self._num_added = 0
        # The limits in force: lower than the config's while a device's memory is short.
        self.max_running, self.max_step_tokens = config.max_num_seqs, config.max_num_batched_tokens

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_held_back(self) -> int:
        """Running requests that `schedule` passes over until their last token is read."""
        return sum(request.may_be_held_back and is_held_back(request) for request in self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def has_work(self) -> bool:
        """Some request has not ended. If `schedule` then gives an empty batch, steps in flight must be read first."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queues a new request.

        Raises:
          ValueError: it can never run, or its id is in use.
        """
        num_prompt = len(request.prompt_token_ids)
        if request.request_id in self._requests:
            raise ValueError(f"request_id {request.request_id!r} is in use by a request that has not ended.")
        if num_prompt < 1:
            raise ValueError("the prompt is empty: it must have at least one token.")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {request.max_tokens}.")
        num_needed = num_prompt if request.is_pooling else num_prompt + 1
        if num_needed > self.config.max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and the answer needs at least 1, more than "
                f"max_model_len={self.config.max_model_len}: shorten the prompt or raise max_model_len."
            )
        if num_needed > self.max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and the answer needs at least 1, which is "
                f"{self._num_pages(num_needed)} pages of {self.pool.page_size} tokens, but the KV cache has "
                f"{self.pool.num_usable}: shorten the prompt, or raise kv_cache_memory_bytes or gpu_memory_utilization."
            )
        request.arrival_order = self._num_added
        self._num_added += 1
        self._requests[request.request_id] = request
        insort(self.waiting, request, key=self._rank)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request at once. None if it is unknown or has ended already."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a request and frees its pages and slot. Tokens of it still on the device will be ignored."""
        if request.is_finished:
            return
        if request.status is RequestStatus.RUNNING:
            self._remove(self.running, request)
            self._release(request)
        else:
            self._remove(self.waiting, request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        request.finished_time = time.monotonic()
        del self._requests[request.request_id]

    def schedule(self) -> ScheduledBatch:
        """The next step: running decodes, then running prefills, then waiting requests, within the token budget."""
        budget = self.max_step_tokens
        decodes: list[ScheduledChunk] = []
        prefills: list[ScheduledChunk] = []
        preempted: list[Request] = []
        num_steps = self._num_steps()

        # Never more decodes than the budget: each began as a chunk in a step that had room for it beside the others.
        for request in list(self.running):
            # A request later in the list may have been preempted for an earlier one (it has no device token then),
            # never the other way round: so nothing that is in this step already loses its pages.
            if not request.has_device_token:
                continue
            if request.may_be_held_back and is_held_back(request):
                budget -= 1  # nobody comes in on its place in the step: it will be back
                continue
            if not self._may_grow(request) or not self._make_room(request, preempted, num_steps):
                continue
            decodes.append(self._advance(request, 1, num_steps))
            budget -= 1

        for request in self.running:
            if budget == 0 or len(prefills) == self.config.max_num_prefills:
                break
            if not request.has_device_token:
                prefills.append(self._advance(request, budget))
                budget -= prefills[-1].num_tokens

        # Pages are short after a preemption: who came in now would be the next to be thrown out.
        while not preempted and self.waiting and budget > 0 and len(prefills) < self.config.max_num_prefills:
            request = self.waiting[0]
            if not self._admit(request):
                break
            prefills.append(self._advance(request, budget))
            budget -= prefills[-1].num_tokens

        return ScheduledBatch(decodes, prefills, preempted, num_steps)

    def update(self, batch: ScheduledBatch, token_ids: Sequence[int]) -> list[tuple[Request, int]]:
        """Takes the tokens that one step sampled, in the order of `batch.sampling`; steps are read in their order.

        Returns:
          The requests that got a token, and the token, those included that end by it. Requests that ended before are
          left out. Token -1 (the sampler found NaN) is not appended: it ends the request with "error".
        """
        sampling = batch.sampling
        if len(token_ids) != len(sampling):
            raise RuntimeError(f"the step samples {len(sampling)} tokens, got {len(token_ids)}.")
        accepted = []
        for chunk, token in zip(sampling, map(int, token_ids), strict=True):
            request = chunk.request
            request.num_pending -= 1
            if request.is_finished:
                continue
            accepted.append((request, token))
            if token < 0:
                # What it computed may be NaN too: nobody else should get it from the cache.
                self.pool.unregister(request.page_ids)
                request.num_registered_pages = len(request.page_ids)
                self.finish(request, "error")
                continue
            request.output_token_ids.append(token)
            if request.first_token_time is None:
                request.first_token_time = time.monotonic()
            self._finish_if_last(request, token)
        for chunk in batch.decodes + batch.prefills:
            if chunk.request.status is RequestStatus.RUNNING:
                self._register_pages(chunk.request)
        return accepted

    def forget_computed(self) -> None:
        """The device has lost all that it computed, steps in flight too: who ran waits, and is computed again."""
        for request in list(reversed(self.running)):
            request.num_registered_pages = len(request.page_ids)  # nothing of it may come into the prefix cache
            self._preempt(request)
        for request in self.waiting:
            request.num_pending = 0
        self.pool.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Raises RuntimeError unless pages, slots and queues agree. Cheap enough to run whenever the engine is idle."""
        self.pool.check_integrity([page for request in self.running for page in request.page_ids])
        held = [request.slot for request in self.running if request.slot is not None]
        if sorted(self._free_slots + held) != list(range(self.config.max_num_seqs)) or len(held) != self.num_running:
            raise RuntimeError(f"scheduler: slots are lost or held twice: free {self._free_slots}, held {held}.")
        if len(self.running) + len(self.waiting) != len(self._requests):
            raise RuntimeError("scheduler: a request is in no queue, or in two.")

    def _rank(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.config.policy == "priority" else 0, request.arrival_order)

    def _remove(self, queue: list[Request], request: Request) -> None:
        index = bisect_left(queue, self._rank(request), key=self._rank)
        if index == len(queue) or queue[index] is not request:
            raise RuntimeError(f"scheduler: request {request.request_id!r} is not in its queue.")
        del queue[index]

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.page_size)

    def _num_steps(self) -> int:
        """All where nobody waits and no token depends on the host. Those behind an answer's end are in vain."""
        more = 0 if self.waiting else self.config.num_steps - 1
        fits = lambda r: r.is_plain and r.has_device_token and r.num_tokens + more < self.max_model_len
        return 1 + more if more and all(map(fits, self.running)) else 1

    def _may_grow(self, request: Request) -> bool:
        """False where a token still on the device will be the last by max_tokens or max_model_len."""
        num_output = len(request.output_token_ids) + request.num_pending
        return num_output < request.max_tokens and request.num_tokens < self.max_model_len

    def _finish_if_last(self, request: Request, token: int) -> None:
        num_output = len(request.output_token_ids)
        if num_output > request.params.min_tokens:
            if token in request.eos_token_ids:
                return self.finish(request, "stop")
            if token in request.stop_token_ids:
                return self.finish(request, "stop", token)
        if num_output >= request.max_tokens or request.num_known_tokens >= self.max_model_len:
            self.finish(request, "length")

    def _advance(self, request: Request, budget: int, num_steps: int = 1) -> ScheduledChunk:
        """Takes up to `budget` tokens of a running request into the step, or one into each of several."""
        start = request.num_computed_tokens
        left = request.num_tokens - start
        num_tokens = min(left, budget)
        samples = num_tokens == left
        request.num_computed_tokens += num_tokens + num_steps - 1
        if samples:
            request.num_pending += num_steps
            request.has_device_token = True
        return ScheduledChunk(request, start, num_tokens, samples)

    def _admit(self, request: Request) -> bool:
        """Gives the first waiting request a slot and the pages of all its tokens, if there are enough.

        All at once: a long prompt let in by its first chunk would find the pool full in its middle, having taken
        from others what it cannot use. And half a page stays free for each request that runs, or the newcomer would
        soon be thrown out for their next pages: simulated with 400 requests of 100 to 1024 + 100 to 1024 tokens on
        2500 pages of 64, this takes preemptions from 207 to 27 and computed tokens from 120 % to 104 % of those
        needed, for 1 % more steps.
        """
        # A preempted request's late tokens must be known before they can be computed again.
        if request.num_pending > 0 or self.num_running >= self.max_running:
            return False
        cached = self._find_cached(request)
        self.pool.touch(cached)
        num_new = self._num_pages(request.num_tokens) - len(cached)
        if num_new + self.num_running // 2 > self.pool.num_free:
            self.pool.free(cached)
            return False
        request.page_ids = cached + self.pool.allocate(num_new)
        num_loaded = self._load(request, len(cached))
        request.num_registered_pages = len(cached) + num_loaded
        request.num_computed_tokens = request.num_registered_pages * self.pool.page_size
        request.slot = heapq.heappop(self._free_slots)
        request.status = RequestStatus.RUNNING
        if request.first_scheduled_time is None:
            request.first_scheduled_time = time.monotonic()
            request.num_cached_tokens = request.num_computed_tokens
            request.num_loaded_tokens = num_loaded * self.pool.page_size
        self._remove(self.waiting, request)
        insort(self.running, request, key=self._rank)
        return True

    def _find_cached(self, request: Request) -> list[int]:
        """Cached pages of the request's longest prefix."""
        return self.pool.find_cached(self._prefix_hashes(request))

    def _load(self, request: Request, num_cached: int) -> int:
        """Takes what the host has of the prefix behind the cached pages: copied in before the step. Returns how many
        pages; they are known on the device from now on."""
        host, hashes = self.pool.host, self._prefix_hashes(request)[num_cached:]
        if host is None or not (num := host.count(hashes)):
            return 0
        page_ids = request.page_ids[num_cached : num_cached + num]
        host.load(hashes[:num], page_ids)
        for page, page_hash in zip(page_ids, hashes[:num], strict=True):
            self.pool.register(page, page_hash)
        return num

    def _prefix_hashes(self, request: Request) -> list[bytes]:
        """Of the full pages that may be reused: short of the last token, which must be computed."""
        if not self.pool.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return []
        num_full = (request.num_known_tokens - 1) // self.pool.page_size
        self._hash_pages(request, num_full)
        return request.page_hashes[:num_full]

    def _hash_pages(self, request: Request, num_pages: int) -> None:
        size = self.pool.page_size
        for i in range(len(request.page_hashes), num_pages):
            parent = request.page_hashes[-1] if request.page_hashes else None
            tokens = request.tokens(i * size, (i + 1) * size)
            request.page_hashes.append(hash_page(parent, tokens, request.cache_salt))

    def _register_pages(self, request: Request) -> None:
        """Offers the full pages to the prefix cache whose tokens the host knows and a dispatched step computes."""
        if not self.pool.enable_prefix_caching:
            return
        num_full = min(request.num_computed_tokens, request.num_known_tokens) // self.pool.page_size
        self._hash_pages(request, num_full)
        for i in range(request.num_registered_pages, num_full):
            self.pool.register(request.page_ids[i], request.page_hashes[i])
        request.num_registered_pages = max(request.num_registered_pages, num_full)

    def _make_room(self, request: Request, preempted: list[Request], num_steps: int) -> bool:
        """Makes sure that a decode has the page of its next tokens, at the cost of the last in rank, maybe itself."""
        if self._num_pages(request.num_tokens + num_steps - 1) <= len(request.page_ids):
            return True
        while self.pool.num_free == 0:
            victim = self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is request:
                return False
        request.page_ids += self.pool.allocate(1)
        return True

    def _preempt(self, request: Request) -> None:
        """Takes a request's pages and slot; it will compute its tokens again, outputs included.

        Its rank puts it before all that never ran (fcfs), or before those of its own or a worse priority.
        """
        self._remove(self.running, request)
        self._release(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        insort(self.waiting, request, key=self._rank)

    def _release(self, request: Request) -> None:
        self._register_pages(request)
        self.pool.free(request.page_ids)
        request.page_ids = []
        request.num_computed_tokens = 0
        request.has_device_token = False
        if request.slot is not None:
            heapq.heappush(self._free_slots, request.slot)
            request.slot = None

"""What becomes of everyone when a step fails: who ends, who is computed again, and whether the device works at all.

A step donates the KV cache and the device's state, so after a failure nobody can say what they hold, and the step that
was dispatched behind it has computed with that. So both are made anew and whoever goes on is computed again from the
tokens that the host knows: rare enough to be simple.
"""

import logging

from qjax.engine.request import Request, RequestError
from qjax.engine.runner import Runner
from qjax.engine.scheduled import ScheduledBatch, ScheduledChunk
from qjax.engine.scheduler import Scheduler
from qjax.outputs import STEP_FAILED
from qjax.sampling_params import SamplingParams

log = logging.getLogger("qjax")

MIN_STEP_TOKENS = 16  # a step of one request and so many tokens is not made smaller
STEPS_UNTIL_LARGER = 500  # that end well, before a batch that was made smaller for want of memory is doubled


class StepError(Exception):
    """A step could not be dispatched, or its output could not be read; `__cause__` says why."""

    def __init__(self, batch: ScheduledBatch):
        super().__init__("a step failed")
        self.batch = batch


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether XLA, or a device's allocator, had no room."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class Recovery:
    """Puts an engine's scheduler and runner back to where they can go on.

    Attributes:
      is_short: steps are smaller than the options allow, as memory was short.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner):
        self._scheduler = scheduler
        self._runner = runner
        self._num_good = 0  # steps since the limits were changed
        self.is_short = False

    def after(self, failure: StepError) -> list[Request]:
        """Ends who cannot be computed; the others wait, and will be. To be called with no step in flight.

        Returns:
          The requests that were ended, with "error".

        Raises:
          RuntimeError: the device does nothing any more.
        """
        cause, batch = failure.__cause__, failure.batch
        requests = [c.request for c in (*batch.decodes, *batch.prefills) if not c.request.is_finished]
        failed = [r for r in requests if not isinstance(cause, RequestError) or r is cause.request]
        self._scheduler.forget_computed()
        if is_out_of_memory(cause) and self._shrink(batch):
            failed = []
            log.warning(
                "out of memory in a step of %d requests and %d tokens: they are computed again, at most %d at a time "
                "and %d tokens a step for now. A lower --gpu-memory-utilization, --max-num-seqs or "
                "--max-num-batched-tokens avoids this. (%s)",
                *(len(requests), batch.num_tokens, self._scheduler.max_running, self._scheduler.max_step_tokens, cause),
                extra={"request_ids": [request.request_id for request in requests]},
            )
        else:
            ids = [request.request_id for request in failed]
            log.error(
                "a step failed, so %d request(s) end: %s. The others are computed again.",
                *(len(ids), ", ".join(ids)),
                exc_info=cause,
                extra={"request_ids": ids},
            )
        for request in failed:
            self._scheduler.finish(request, "error", STEP_FAILED)
        try:
            self._runner.drop_cache()
            self._runner.make_cache()
            self._try_device()
        except Exception as error:
            raise RuntimeError(f"after a step that failed, the device does nothing any more: {error}") from error
        return failed

    def on_good_step(self) -> None:
        """To be called while `is_short`: larger steps are tried again after a while."""
        self._num_good += 1
        if self._num_good < STEPS_UNTIL_LARGER:
            return
        scheduler, config = self._scheduler, self._scheduler.config
        scheduler.max_running = min(2 * scheduler.max_running, config.max_num_seqs)
        scheduler.max_step_tokens = min(2 * scheduler.max_step_tokens, config.max_num_batched_tokens)
        self._num_good = 0
        full = (config.max_num_seqs, config.max_num_batched_tokens)
        self.is_short = (scheduler.max_running, scheduler.max_step_tokens) != full
        log.info("up to %d requests and %d tokens a step again", scheduler.max_running, scheduler.max_step_tokens)

    def _shrink(self, batch: ScheduledBatch) -> bool:
        """Halves what a step may hold. False if it was one that cannot be smaller."""
        num_requests, num_tokens = len(batch.decodes) + len(batch.prefills), batch.num_tokens
        if num_requests == 1 and num_tokens <= MIN_STEP_TOKENS:
            return False
        limits = self._scheduler
        if num_requests > 1:
            limits.max_running = min(limits.max_running, num_requests // 2)
        limits.max_step_tokens = min(limits.max_step_tokens, max(num_tokens // 2, MIN_STEP_TOKENS))
        # The tokens of all that run are in one step when they decode.
        limits.max_step_tokens = max(limits.max_step_tokens, limits.max_running)
        self.is_short, self._num_good = True, 0
        return True

    def _try_device(self) -> None:
        """Computes one token that nobody asked for. Raises what the device says."""
        params = SamplingParams(temperature=0.0, max_tokens=1)
        request = Request("a try", [0], params, max_tokens=1, is_pooling=self._runner.pooling, page_ids=[1], slot=0)
        chunk = ScheduledChunk(request, 0, 1, samples=True)
        self._runner.collect(self._runner.dispatch(ScheduledBatch([], [chunk], [])))

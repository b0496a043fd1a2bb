"""`CompiledSteps`: the executables of `step`, one a bucket and option set: compiled at first use, or ahead of it."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from tqdm import tqdm

from qjax import sharding
from qjax.engine.buckets import Bucket
from qjax.engine.program import Key, Program
from qjax.engine.step import StepOptions
from qjax.engine.tracing import TracedSteps
from qjax.models.qwen3 import ModelDef

log = logging.getLogger("qjax")

# This pass counts a cache that is written in place once for each layer, sees far too little memory, and computes small
# things again in every layer.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_disable_hlo_passes": "rematerialization"}
# For products of many rows cuBLAS wins every time; compiling Triton's kernels only to try them takes most of the time.
MANY_ROWS = 96
SMALL_ROWS = 128


class CompiledSteps:
    """Gives each step its executable.

    Args:
      program: what is compiled.
      modeldef, leaves: the model, its leaves in form only, so that it may still be loading.
      folder: see `TracedSteps`.

    Attributes:
      count, seconds: of all compilations.
      is_running: something is compiled while a batch waits for it.
      ended: when that was over, in time.monotonic's seconds.
    """

    def __init__(self, program: Program, modeldef: ModelDef, leaves: tuple[jax.ShapeDtypeStruct, ...], folder: Path):
        self.program = program
        self.traced = TracedSteps(program, folder)
        self._modeldef, self._leaves = modeldef, leaves
        self._steps: dict[Key, Callable] = {}
        self._begun: dict[Key, Future[Callable]] = {}
        self._pool = ThreadPoolExecutor(max_workers=16)  # tracing holds Python's lock, but the compiler does not
        self.count, self.seconds = 0, 0.0
        self.is_running, self.ended = False, 0.0

    def get(self, bucket: Bucket, options: StepOptions) -> Callable:
        key = (bucket, options)
        if key not in self._steps:
            started = time.perf_counter()
            self.is_running = True
            try:
                self._steps[key] = self._compile(key)
            finally:
                self.is_running, self.ended = False, time.monotonic()
            self._add(1, started)
            log.debug("compiled %s %s in %.1f s", bucket, options, time.perf_counter() - started)
        return self._steps[key]

    def begin(self, keys: Sequence[Key]) -> None:
        """Has steps made for `ahead` while other things go on: traced by other processes, and the small ones compiled.

        The large ones wait: XLA takes the kernel of each product that was fastest, which it can only tell while the
        device does nothing else. Small steps multiply with kernels of our own, or as fast as memory gives.
        """
        if self.program.plan.is_gpu and sharding.tensor_parallel_size(self.program.mesh) == 1:
            self.traced.start(keys)
            small = [key for key in keys if _num_rows(key) <= SMALL_ROWS and self.traced.is_coming(key)]
            self._begun = {key: self._pool.submit(self._compile, key) for key in small}

    def cancel(self) -> None:
        """What has begun is not needed: the start failed."""
        self.traced.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ahead(self, keys: Sequence[Key], *, progress: bool) -> None:
        """All of them, several at a time."""
        started = time.perf_counter()
        with tqdm(total=len(keys), desc="Compiling", unit="shape", disable=not progress) as bar:
            futures = {key: self._begun.get(key) or self._pool.submit(self._compile, key) for key in keys}
            for key, future in futures.items():
                self._steps[key] = future.result()
                bar.update()
        self._begun.clear()
        self._add(len(keys), started)

    def _compile(self, key: Key) -> Callable:
        few_tries = {"xla_gpu_enable_triton_gemm": False} if _num_rows(key) >= MANY_ROWS else {}
        step = self.traced.get(key) or self.program.step(self._modeldef, *key)
        assert isinstance(self.program.mesh, jax.sharding.Mesh)
        with jax.set_mesh(self.program.mesh):
            lowered = step.lower(*self.program.arguments(self._leaves, *key))
        return lowered.compile(COMPILER_OPTIONS | few_tries)

    def _add(self, count: int, started: float) -> None:
        self.count += count
        self.seconds += time.perf_counter() - started


def _num_rows(key: Key) -> int:
    bucket, _ = key
    return bucket.num_decodes + bucket.num_tokens

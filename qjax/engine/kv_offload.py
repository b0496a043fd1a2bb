"""`OffloadingRunner`: a runner that also copies KV pages to the host's memory and back, as `host_cache` says.

A page is an array of its own on the host, pinned, so that the device copies it without the processor. On the way out
pages are gathered into small arrays of the device, which go to the host while the next steps run; on the way in they
are put beside the cache and then written into it. Both are dispatched before the step that overwrites or reads the
pages, and the device works in that order: the loop waits for no copy out. For a copy in it waits only where the next
one would need more staging memory than is planned; the device has nothing else to do then.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from qjax import sharding
from qjax.engine.host_cache import HostCache
from qjax.engine.memory import GIB, STAGED_LOADS
from qjax.engine.runner import InFlight, Runner, StepResult
from qjax.engine.scheduled import ScheduledBatch

log = logging.getLogger("qjax")

CHUNK_SIZES = (8, 4, 2, 1)  # pages that one call copies: each is a trace
FEW = 16  # pages that wait for more of them: a copy costs the host as much as a step

type Page = jax.Array  # [L, 2, K, S, H]


@jax.jit
def gather(kv: jax.Array, page_ids: jax.Array) -> tuple[jax.Array, ...]:
    """Copies of the pages int32 [n] of a cache [L, 2, P, K, S, H]."""
    pick = lambda i: jax.lax.dynamic_index_in_dim(kv, page_ids[i], axis=2, keepdims=False)
    return tuple(pick(i) for i in range(page_ids.shape[0]))


def _scatter(kv: jax.Array, page_ids: jax.Array, pages: Sequence[jax.Array]) -> jax.Array:
    for i, page in enumerate(pages):
        kv = jax.lax.dynamic_update_index_in_dim(kv, page, page_ids[i], axis=2)
    return kv


scatter = jax.jit(_scatter, donate_argnums=0)  # the cache with the pages int32 [n] replaced


@dataclass
class OffloadingRunner(Runner):
    """A runner with a `HostCache`, which the scheduler's block pool knows too."""

    host_cache: HostCache[Page] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.on_device = sharding.kv_page_sharding(self.mesh)
        self.on_host = self.on_device.with_memory_kind("pinned_host")
        self._is_tried = False
        self._leaving: deque[tuple[Page, int]] = deque()  # of each chunk on its way out a page, and how many there are

    def make_cache(self) -> None:
        super().make_cache()
        if not self._is_tried:
            self._try_copies()
            self._is_tried = True

    def drop_cache(self) -> None:
        assert self.host_cache is not None
        super().drop_cache()
        self.host_cache.on_device_lost()

    def dispatch(self, batch: ScheduledBatch) -> InFlight:
        assert self.host_cache is not None
        self.host_cache.on_step()
        if self.host_cache.num_wanted >= FEW or self.host_cache.has_last_chance:
            self.copy_out()
        if loads := self.host_cache.take_loads():
            with jax.set_mesh(self.mesh):
                self._copy_in(loads)
        return super().dispatch(batch)

    def collect(self, flight: InFlight) -> StepResult:
        assert self.host_cache is not None
        result = super().collect(flight)
        self.host_cache.on_step_read()
        return result

    def copy_out(self) -> None:
        """Starts the copies of what is to leave the device, as far as there is staging memory; waits for nothing."""
        assert self.host_cache is not None
        while self._leaving and self._leaving[0][0].is_ready():  # type: ignore[attr-defined]
            self._leaving.popleft()
        limit = None
        if self.plan.is_gpu:
            limit = max(self.plan.num_staged_pages - sum(num for _, num in self._leaving), 0)
        stores = self.host_cache.take_stores(limit)
        copied: list[Page] = []
        with jax.set_mesh(self.mesh):
            for chunk in _chunks([page_id for _, page_id in stores]):
                pages = jax.device_put(list(gather(self.kv, chunk)), self.on_host)
                self._leaving.append((pages[-1], len(pages)))
                copied += pages
        self.host_cache.store([(page_hash, page) for (page_hash, _), page in zip(stores, copied, strict=True)])

    def _copy_in(self, loads: Sequence[tuple[int, Page]]) -> None:
        staged: deque[Any] = deque()
        for chunk in _chunks([page_id for page_id, _ in loads]):
            if len(staged) == STAGED_LOADS // CHUNK_SIZES[0] - 1:
                jax.block_until_ready(staged.popleft())
            pages, loads = [page for _, page in loads[: len(chunk)]], loads[len(chunk) :]
            staged.append(jax.device_put(pages, self.on_device))
            self.kv = scatter(self.kv, chunk, staged[-1])

    def _try_copies(self) -> None:
        """Copies the null page out and in: what is compiled now does not hold up a request, and memory that the host
        does not have is missed now."""
        assert self.host_cache is not None
        with jax.set_mesh(self.mesh):
            for size in CHUNK_SIZES:
                chunk = np.zeros(size, np.int32)
                pages = jax.device_put(list(gather(self.kv, chunk)), self.on_host)
                self.kv = scatter(self.kv, chunk, jax.device_put(pages, self.on_device))
        if not self.plan.is_gpu:
            return
        # Pinning takes seconds for some GiB. What is pinned stays with the allocator.
        try:
            jax.block_until_ready([jax.device_put(pages[0], self.on_host) for _ in range(self.host_cache.capacity)])
        except Exception as error:
            gib = self.host_cache.capacity * self.host_cache.page_bytes / GIB
            raise ValueError(f"kv_offloading_size: the host has no {gib:.1f} GiB to pin, lower it: {error}") from error


def _chunks(page_ids: Sequence[int]) -> Iterator[np.ndarray]:
    """int32 arrays of CHUNK_SIZES, together the given ids."""
    start = 0
    while start < len(page_ids):
        size = next(size for size in CHUNK_SIZES if size <= len(page_ids) - start)
        yield np.asarray(page_ids[start : start + size], np.int32)
        start += size

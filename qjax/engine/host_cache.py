"""KV pages kept in the host's memory, under the same hashes as on the devices: which are there, and which are to move.

This file counts, like `block_pool`; `kv_offload` copies. A full page is copied out soon after it is computed, long
before the device needs its place. So nobody waits for a copy when a page is evicted, and what is lost is at most what
was computed just before.

The order of the device's work makes this safe: a page that is given to another request still has its content until the
next step is dispatched, and every copy is dispatched before that step.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence


class HostCache[Page]:
    """At most `capacity` pages, the least recently used of which are dropped.

    Args:
      capacity: pages.
      page_bytes: of a page on all devices together, for the counts.

    Attributes:
      num_stored, num_loaded: pages copied out, and pages asked for, since the start.
    """

    def __init__(self, capacity: int, page_bytes: int = 1) -> None:
        self.capacity, self.page_bytes = capacity, page_bytes
        self.num_stored = self.num_loaded = 0
        self._pages: OrderedDict[bytes, Page] = OrderedDict()  # least recently used first
        self._wanted: OrderedDict[bytes, int] = OrderedDict()  # hash -> the device's page, to be copied out
        self._last_chance: OrderedDict[bytes, int] = OrderedDict()  # the same, evicted: the next step overwrites them
        self._loads: list[tuple[int, Page]] = []  # device's page and what comes into it, before the next step
        self._doubtful: deque[list[bytes]] = deque()  # stored before each of the steps that are in flight

    def __len__(self) -> int:
        return len(self._pages)

    # What the block pool tells

    def offer(self, page_hash: bytes, page_id: int) -> None:
        """The device has this page: it becomes the most recently used, or will be copied out."""
        if page_hash in self._pages:
            self._pages.move_to_end(page_hash)
        else:
            self._wanted[page_hash] = page_id

    def on_evicted(self, page_hash: bytes) -> None:
        """The device's page will be overwritten by the next step."""
        if (page_id := self._wanted.pop(page_hash, None)) is not None:
            self._last_chance[page_hash] = page_id

    def forget(self, page_hash: bytes) -> None:
        """The content is wrong."""
        for pages in (self._pages, self._wanted, self._last_chance):
            pages.pop(page_hash, None)

    def clear(self) -> None:
        """Forgets all, after the block pool did: what it evicted is not copied either."""
        for pages in (self._pages, self._wanted, self._last_chance):
            pages.clear()

    def on_device_lost(self) -> None:
        """What the device held is gone, and what steps in flight were to compute is not to be trusted."""
        self._wanted.clear()
        self._last_chance.clear()
        self._loads.clear()
        for hashes in self._doubtful:
            for page_hash in hashes:
                self._pages.pop(page_hash, None)
        self._doubtful.clear()

    # What the scheduler asks

    def count(self, hashes: Iterable[bytes]) -> int:
        """How many pages of this prefix are here, up to the first that is not."""
        num = 0
        for page_hash in hashes:
            if page_hash not in self._pages:
                break
            num += 1
        return num

    def load(self, hashes: Sequence[bytes], page_ids: Sequence[int]) -> None:
        """Has these pages, all of them here, copied into pages of the device before the next step."""
        # Who loads holds the content, so that it may be dropped here before it is copied.
        self._loads += [(page_id, self._pages[h]) for h, page_id in zip(hashes, page_ids, strict=True)]
        self.num_loaded += len(hashes)

    # What the copier does, before each step

    def take_stores(self, limit: int | None = None) -> list[tuple[bytes, int]]:
        """(hash, device's page) of what to copy out before the next step, at most `limit`; None: no limit.

        What is evicted and is more than that is lost; the others wait for the next step.
        """
        wanted = [*self._last_chance.items(), *self._wanted.items()][:limit]
        self._last_chance.clear()
        for page_hash, _ in wanted:
            self._wanted.pop(page_hash, None)
        return wanted

    @property
    def num_wanted(self) -> int:
        """Pages that are to be copied out, but need not be before the next step."""
        return len(self._wanted)

    @property
    def has_last_chance(self) -> bool:
        """Whether some page must be copied out before the next step, or is lost."""
        return bool(self._last_chance)

    def take_loads(self) -> list[tuple[int, Page]]:
        """(device's page, content) of what to copy in before the next step."""
        loads, self._loads = self._loads, []
        return loads

    def on_step(self) -> None:
        """A step is about to be dispatched; until it is read, nobody knows whether what is copied now is right."""
        self._doubtful.append([])

    def store(self, pages: Sequence[tuple[bytes, Page]]) -> None:
        """Takes what was copied out."""
        for page_hash, page in pages:
            self._pages[page_hash] = page
            if len(self._pages) > self.capacity:
                self._pages.popitem(last=False)
        self.num_stored += len(pages)
        if self._doubtful:
            self._doubtful[-1] += [page_hash for page_hash, _ in pages]

    def on_step_read(self) -> None:
        """The oldest step in flight has ended well, so what was copied before it is right."""
        self._doubtful.popleft()

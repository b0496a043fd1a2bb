"""Pages of the KV cache: who holds them, and which hold a prefix that a later request can use.

This file counts; it never touches the device. A page is in one of three states: used (references > 0), cached
(none, but its content is known under a hash, so it can be shared or evicted) or free.

Prefix caching follows vLLM's design: a page's hash covers its tokens and, through its parent's hash, all tokens
before them, so equal hashes mean equal prefixes (sha256: a collision would show one user another's text).
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from qjax.engine.host_cache import HostCache

NULL_PAGE = 0  # padding in page tables points here; never given out


def hash_page(parent: bytes | None, token_ids: Sequence[int], salt: str | None = None) -> bytes:
    """Hash of a full page after the page `parent` (None: the first page, to which alone the salt is added)."""
    if parent is None:
        # A digest has a fixed length, so no choice of salt and tokens can pass for another.
        parent = hashlib.sha256(b"" if salt is None else b"salt:" + salt.encode()).digest()
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


def page_hashes(
    token_ids: Sequence[int], page_size: int, salt: str | None = None, known: Sequence[bytes] = ()
) -> list[bytes]:
    """Chained hashes of all full pages of `token_ids`; `known` are those of its first pages, not computed again."""
    hashes = list(known)
    for i in range(len(hashes), len(token_ids) // page_size):
        parent = hashes[-1] if hashes else None
        hashes.append(hash_page(parent, token_ids[i * page_size : (i + 1) * page_size], salt))
    return hashes


class BlockPool:
    """Reference counts, free pages and the prefix cache of `num_pages` pages, of which page 0 is never given out.

    Args:
      num_pages: pages of the KV cache, the null page included.
      page_size: tokens in a page.
      enable_prefix_caching: when false, `register` does nothing and `find_cached` finds nothing.
      host: is told of all pages that are known under a hash, and keeps copies. None: what is evicted is lost.
    """

    def __init__(
        self, num_pages: int, page_size: int, enable_prefix_caching: bool = True, host: HostCache[Any] | None = None
    ) -> None:
        if num_pages < 2 or page_size < 1:
            raise ValueError(
                f"the KV cache has room for {num_pages} pages of {page_size} tokens, it needs at least 2: "
                "raise kv_cache_memory_bytes or gpu_memory_utilization."
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.host = host
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # a stack: low pages first
        self._cached: OrderedDict[int, None] = OrderedDict()  # pages without references, least recently used first
        self._page_of: dict[bytes, int] = {}  # hash -> page, used or cached
        self._hash_of: dict[int, bytes] = {}  # the inverse

    @property
    def num_usable(self) -> int:
        """Pages that can be given out: all but the null page."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give: free ones and cached ones nobody holds."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the pages that requests hold, in [0, 1]."""
        return 1.0 - self.num_free / self.num_usable

    def find_cached(self, hashes: Iterable[bytes]) -> list[int]:
        """Pages of the longest known prefix. Takes no reference: `touch` them before the next `allocate`."""
        pages: list[int] = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def touch(self, page_ids: Sequence[int]) -> None:
        """Takes a reference to each of these used or cached pages."""
        for page in page_ids:
            if self._refs[page] == 0:
                if page not in self._cached:
                    raise RuntimeError(f"page {page} is free: it cannot be shared.")
                del self._cached[page]
            self._refs[page] += 1

    def allocate(self, n: int) -> list[int]:
        """`n` pages with one reference each; evicts the least recently used cached pages once none is free.

        Raises:
          RuntimeError: fewer than `n` are left. Nothing is taken then.
        """
        if n > self.num_free:
            raise RuntimeError(f"{n} pages wanted, {self.num_free} left: the caller must look at num_free first.")
        pages = []
        for _ in range(n):
            if self._free:
                page = self._free.pop()
            else:
                page, _none = self._cached.popitem(last=False)
                self._forget(page)
            self._refs[page] = 1
            pages.append(page)
        return pages

    def free(self, page_ids: Sequence[int]) -> None:
        """Gives back one reference to each page of a sequence, given in the sequence's order.

        They are let go from the last to the first: a prefix is of no use without its head, so tails are evicted
        first.
        """
        for page in reversed(page_ids):
            if self._refs[page] < 1:
                raise RuntimeError(f"page {page} is given back by someone who does not hold it.")
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if page in self._hash_of:
                    self._cached[page] = None
                    self._offer(page)
                else:
                    self._free.append(page)

    def register(self, page_id: int, page_hash: bytes) -> None:
        """Makes a full, used page known under its hash.

        Where another page has the same content already, that one stays known and this one stays private: nothing
        moves, and it is freed like any other.
        """
        if self._refs[page_id] < 1:
            raise RuntimeError(f"page {page_id} is registered by someone who does not hold it.")
        if not self.enable_prefix_caching or page_hash in self._page_of or page_id in self._hash_of:
            return
        self._page_of[page_hash] = page_id
        self._hash_of[page_id] = page_hash
        self._offer(page_id)

    def unregister(self, page_ids: Iterable[int]) -> None:
        """Makes pages unknown whose content turned out to be wrong (a request that computed NaN)."""
        for page in page_ids:
            if page in self._hash_of:
                if self.host is not None:
                    self.host.forget(self._hash_of[page])
                self._forget(page)
                if page in self._cached:
                    del self._cached[page]
                    self._free.append(page)

    def reset_prefix_cache(self, reset_external: bool = False) -> bool:
        """Forgets all cached pages, with `reset_external` (vLLM's name) also the host's copies.

        Does nothing and returns False while any page is in use.
        """
        if self.num_free != self.num_usable:
            return False
        for page in self._cached:
            self._forget(page)
        self._free += self._cached
        self._cached.clear()
        if reset_external and self.host is not None:
            self.host.clear()
        return True

    def check_integrity(self, held: Iterable[int] | None = None) -> None:
        """Raises RuntimeError unless free + cached + used == total and all counts agree.

        Args:
          held: the pages of all requests, a page once for each request that holds it; checked against the counts.
        """
        used = {page for page, refs in enumerate(self._refs) if refs > 0}
        free = set(self._free)
        problems = {
            "the null page is in use": self._refs[NULL_PAGE] != 0 or NULL_PAGE in free or NULL_PAGE in self._cached,
            "negative references": min(self._refs) < 0,
            "a page is free twice": len(free) != len(self._free),
            "a page is in two states": bool(free & used or free & self._cached.keys() or used & self._cached.keys()),
            "pages are lost": len(free) + len(self._cached) + len(used) != self.num_usable,
            "a cached page has no hash": not self._cached.keys() <= self._hash_of.keys(),
            "a free page has a hash": bool(free & self._hash_of.keys()),
            "hashes and pages differ": {h: p for p, h in self._hash_of.items()} != self._page_of,
            "references differ from what requests hold": held is not None
            and Counter(held) != Counter({page: self._refs[page] for page in used}),
        }
        found = [problem for problem, is_true in problems.items() if is_true]
        if found:
            raise RuntimeError(
                f"block pool: {', '.join(found)} (free {len(self._free)}, cached {len(self._cached)}, "
                f"used {len(used)}, total {self.num_usable})."
            )

    def _forget(self, page: int) -> None:
        page_hash = self._hash_of.pop(page)
        del self._page_of[page_hash]
        if self.host is not None:
            self.host.on_evicted(page_hash)

    def _offer(self, page: int) -> None:
        if self.host is not None:
            self.host.offer(self._hash_of[page], page)

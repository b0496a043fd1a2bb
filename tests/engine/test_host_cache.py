"""What the host keeps, in which order it is copied and dropped. Beside the scheduler: test_engine_machine.py."""

import pytest

from qjax.engine.block_pool import BlockPool, page_hashes
from qjax.engine.host_cache import HostCache

S = 4
A, B = (list(range(start, start + 3 * S)) for start in (0, 100))


def pool(num_pages=8, capacity=10):
    return BlockPool(num_pages, S, host=HostCache(capacity))


def fill(pool, tokens):
    hashes = page_hashes(tokens, S)
    pages = pool.allocate(len(hashes))
    for page, page_hash in zip(pages, hashes, strict=True):
        pool.register(page, page_hash)
    return pages, hashes


def step(host, limit=None):
    """Copies what a step would: the content is the page's number. Returns the pages."""
    host.on_step()
    stores = host.take_stores(limit)
    host.store([(page_hash, f"of {page}") for page_hash, page in stores])
    return [page for _, page in stores]


def test_a_page_is_copied_once_and_before_it_is_overwritten():
    p = pool()
    pages, hashes = fill(p, A)
    assert (p.host.num_wanted, p.host.has_last_chance) == (3, False)
    assert step(p.host, limit=1) == pages[:1]
    p.free(pages)
    evicted = p.allocate(6)  # two more pages are free, so the tail goes first
    assert evicted[-2:] == [pages[2], pages[1]] and p.host.has_last_chance
    assert step(p.host) == [pages[2], pages[1]]
    assert step(p.host) == [] and p.host.num_stored == 3
    assert p.host.count(hashes) == 3 and p.host.count([bytes(32), *hashes]) == 0
    p.host.load(hashes[:2], [5, 6])
    assert p.host.take_loads() == [(5, f"of {pages[0]}"), (6, f"of {pages[1]}")] and p.host.take_loads() == []


def test_what_is_evicted_and_finds_no_room_is_lost_and_the_others_wait():
    p = pool()
    a, a_hashes = fill(p, A)
    p.free(a)
    p.allocate(5)  # evicts the last page of A
    b, b_hashes = p.allocate(1), [bytes(32)]
    p.host.offer(b_hashes[0], b[0])
    assert step(p.host, limit=1) == [a[2]]
    assert step(p.host, limit=0) == [] and not p.host.has_last_chance
    assert set(step(p.host)) == {a[0], *b}
    assert p.host.count(a_hashes) == 1 and p.host.count(b_hashes) == 1


def test_the_host_is_bounded_and_drops_the_oldest_tail_first():
    p = pool(num_pages=20, capacity=4)
    (a, a_hashes), (b, b_hashes) = fill(p, A), fill(p, B)
    step(p.host)
    p.free(b)
    p.free(a)  # used last; from the tail to the head, so that the head is kept longest
    step(p.host)
    assert len(p.host) == 4
    assert (p.host.count(a_hashes), p.host.count(b_hashes)) == (3, 1)


def test_a_load_keeps_what_it_loads():
    p = pool(capacity=3)
    _, hashes = fill(p, A)
    step(p.host)
    p.host.load(hashes, [1, 2, 3])
    for i in range(3):
        p.host.store([(bytes([i]), "other")])
    assert p.host.count(hashes) == 0
    assert [content for _, content in p.host.take_loads()] == ["of 1", "of 2", "of 3"]


def test_wrong_content_is_forgotten_wherever_it_is():
    p = pool()
    pages, _ = fill(p, A)
    step(p.host, limit=1)
    p.unregister(pages)
    assert step(p.host) == [] and len(p.host) == 0


@pytest.mark.parametrize("reset_external", [False, True])
def test_reset(reset_external):
    """The host's copies outlive the device's, unless they are named; what was not copied yet comes along."""
    p = pool()
    pages, hashes = fill(p, A)
    step(p.host, limit=1)
    assert not p.reset_prefix_cache(reset_external) and p.host.count(hashes) == 1
    p.free(pages)
    assert p.reset_prefix_cache(reset_external) and p.find_cached(hashes) == []
    step(p.host)
    assert p.host.count(hashes) == (0 if reset_external else 3)
    p.check_integrity([])


def test_what_a_failed_step_may_have_spoiled_is_dropped():
    p = pool(num_pages=20)
    (_, good), (_, doubtful) = fill(p, A[: 2 * S]), fill(p, B[: 2 * S])
    assert len(step(p.host, limit=2)) == 2
    p.host.on_step_read()
    step(p.host)
    fill(p, A[S:])
    p.host.on_device_lost()
    assert (p.host.count(good), p.host.count(doubtful)) == (2, 0)
    assert step(p.host) == []  # the device has nothing any more
    p.host.on_step_read()

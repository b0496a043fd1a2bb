"""Pages: references, the prefix cache, and that a broken count is noticed."""

import pytest

from qjax.engine.block_pool import NULL_PAGE, BlockPool, hash_page, page_hashes

S = 4
TOKENS = list(range(3 * S))


def registered(pool, tokens, salt=None):
    """Allocates and registers the full pages of `tokens`."""
    hashes = page_hashes(tokens, pool.page_size, salt)
    pages = pool.allocate(len(hashes))
    for page, page_hash in zip(pages, hashes, strict=True):
        pool.register(page, page_hash)
    return pages, hashes


def test_all_pages_but_the_null_page_are_given_out_once():
    pool = BlockPool(8, S)
    pages = pool.allocate(3) + pool.allocate(4)
    assert sorted(pages) == [1, 2, 3, 4, 5, 6, 7]
    assert NULL_PAGE not in pages
    assert (pool.num_free, pool.usage) == (0, 1.0)
    pool.free(pages)
    assert (pool.num_free, pool.usage) == (7, 0.0)
    pool.check_integrity([])


def test_allocating_too_much_takes_nothing():
    pool = BlockPool(4, S)
    with pytest.raises(RuntimeError, match="4 pages wanted, 3 left"):
        pool.allocate(4)
    assert pool.num_free == 3
    assert pool.allocate(0) == []


def test_a_pool_without_a_page_is_refused():
    with pytest.raises(ValueError, match="kv_cache_memory_bytes"):
        BlockPool(1, S)


def test_hashes_cover_the_prefix_the_salt_and_nothing_else():
    plain = page_hashes(TOKENS, S)
    assert len(plain) == 3
    assert page_hashes([*TOKENS, 99], S) == plain  # the page that is not full has none
    assert page_hashes(TOKENS[: S - 1], S) == []
    assert page_hashes(TOKENS, S, None, plain[:2]) == plain
    other_head = page_hashes([77, *TOKENS[1:]], S)
    assert not set(plain) & set(other_head)  # later pages differ by their parents
    salted = [page_hashes(TOKENS, S, salt) for salt in ("", "a", "b")]
    assert len({h for hashes in (plain, *salted) for h in hashes}) == 12
    assert page_hashes(TOKENS, S, "a") == salted[1]
    assert hash_page(plain[0], TOKENS[S : 2 * S]) == plain[1]
    assert all(len(h) == 32 for h in plain)


def test_known_hashes_are_not_computed_again():
    class NoHead(list):
        def __getitem__(self, index):
            assert index.start >= 2 * S
            return super().__getitem__(index)

    assert page_hashes(NoHead(TOKENS), S, None, page_hashes(TOKENS[: 2 * S], S)) == page_hashes(TOKENS, S)


def test_the_longest_prefix_is_found_used_or_cached():
    pool = BlockPool(10, S)
    pages, hashes = registered(pool, TOKENS)
    assert pool.find_cached(hashes) == pages  # in use by another
    pool.free(pages)
    assert pool.find_cached(hashes) == pages  # held by nobody
    assert pool.num_free == 9
    assert pool.find_cached([*hashes[:2], bytes(32)]) == pages[:2]
    assert pool.find_cached([bytes(32), *hashes]) == []
    assert pool.num_free == 9  # finding takes no reference


def test_shared_pages_are_free_when_the_last_holder_lets_go():
    pool = BlockPool(10, S)
    pages, hashes = registered(pool, TOKENS)
    pool.touch(pool.find_cached(hashes[:2]))
    assert pool.num_free == 6
    pool.free(pages)
    assert pool.num_free == 7
    pool.check_integrity(pages[:2])
    pool.free(pages[:2])
    assert pool.num_free == 9
    pool.check_integrity([])


def test_eviction_takes_the_oldest_sequence_and_its_tail_first():
    pool = BlockPool(7, S)
    old, old_hashes = registered(pool, TOKENS)
    new, new_hashes = registered(pool, [t + 50 for t in TOKENS])
    pool.free(old)
    pool.free(new)
    for num_left in (2, 1, 0):
        pool.allocate(1)
        assert pool.find_cached(old_hashes) == old[:num_left]
        assert pool.find_cached(new_hashes) == new
    pool.allocate(1)
    assert pool.find_cached(new_hashes) == new[:2]
    pool.check_integrity()


def test_a_touched_page_is_no_longer_the_oldest():
    pool = BlockPool(3, S)
    a, a_hashes = registered(pool, TOKENS[:S])
    b, b_hashes = registered(pool, TOKENS[S : 2 * S])
    pool.free(a)
    pool.free(b)
    pool.touch(a)
    pool.free(a)
    pool.allocate(1)
    assert pool.find_cached(a_hashes) == a
    assert pool.find_cached(b_hashes) == []


def test_free_pages_go_before_cached_ones():
    pool = BlockPool(5, S)
    pages, hashes = registered(pool, TOKENS)
    pool.free(pages)
    pool.allocate(1)
    assert pool.find_cached(hashes) == pages


def test_a_second_copy_of_a_page_stays_private():
    pool = BlockPool(8, S)
    first, hashes = registered(pool, TOKENS)
    second, _ = registered(pool, TOKENS)
    assert pool.find_cached(hashes) == first
    pool.free(second)
    pool.check_integrity(first)
    pool.free(first)
    assert pool.find_cached(hashes) == first
    assert pool.num_free == 7
    pool.check_integrity([])


def test_without_prefix_caching_nothing_is_remembered():
    pool = BlockPool(8, S, enable_prefix_caching=False)
    pages, hashes = registered(pool, TOKENS)
    assert pool.find_cached(hashes) == []
    pool.free(pages)
    assert pool.find_cached(hashes) == []
    pool.check_integrity([])


def test_reset_needs_an_idle_pool():
    pool = BlockPool(8, S)
    pages, hashes = registered(pool, TOKENS)
    assert not pool.reset_prefix_cache()
    assert pool.find_cached(hashes) == pages
    pool.free(pages)
    assert pool.reset_prefix_cache()
    assert pool.find_cached(hashes) == []
    assert pool.num_free == 7
    pool.check_integrity([])


def test_unregistered_pages_are_not_found_again():
    pool = BlockPool(8, S)
    pages, hashes = registered(pool, TOKENS)
    pool.unregister(pages[1:2])
    assert pool.find_cached(hashes) == pages[:1]
    pool.free(pages)
    pool.check_integrity([])
    pool.unregister(pages)  # cached, or free already
    assert pool.find_cached(hashes) == []
    pool.check_integrity([])


def test_misuse_is_refused():
    pool = BlockPool(4, S)
    (page,) = pool.allocate(1)
    pool.free([page])
    with pytest.raises(RuntimeError, match="does not hold"):
        pool.free([page])
    with pytest.raises(RuntimeError, match="is free"):
        pool.touch([page])
    with pytest.raises(RuntimeError, match="does not hold"):
        pool.register(page, bytes(32))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda pool, pages: pool._free.pop(), "pages are lost"),
        (lambda pool, pages: pool._free.append(pool._free[0]), "free twice"),
        (lambda pool, pages: pool._free.append(pages[0]), "two states"),
        (lambda pool, pages: pool._cached.update({pages[0]: None}), "two states"),
        (lambda pool, pages: pool._refs.__setitem__(0, 1), "null page"),
        (lambda pool, pages: pool._refs.__setitem__(pages[0], 2), "what requests hold"),
        (lambda pool, pages: pool._refs.__setitem__(pages[0], -1), "negative"),
        (lambda pool, pages: pool._page_of.clear(), "hashes and pages differ"),
        (lambda pool, pages: pool._hash_of.__setitem__(pool._free[0], bytes(32)), "free page has a hash"),
    ],
)
def test_a_broken_count_is_noticed(break_it, message):
    pool = BlockPool(10, S)
    pages, _ = registered(pool, TOKENS)
    pool.check_integrity(pages)
    break_it(pool, pages)
    with pytest.raises(RuntimeError, match=message):
        pool.check_integrity(pages)

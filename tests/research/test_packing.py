"""Rows hold every token of every document once, never over-full, and depend on the seed alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.research.data import Corpus, Loader, Position, Prefetcher
from qjax.research.packing import assemble, best_fit, pack, pieces_of
from tests.research.conftest import counting_corpus

document_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@given(lengths=st.lists(st.integers(1, 16), max_size=80))
def test_best_fit_fills_no_row_too_much_and_leaves_no_two_half_empty(lengths):
    rows = best_fit(np.array(lengths, np.int32), 16)
    filled = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert np.all(filled <= 16)
    assert np.all(filled > 0)
    assert np.count_nonzero(filled <= 8) <= 1  # the second would have gone into the first


@given(lengths=document_lengths, seed=st.integers(0, 3))
def test_every_target_is_there_once_with_what_comes_before_it(lengths, seed):
    L = 16
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    token_ids = np.arange(1, offsets[-1] + 1)  # a token's id says where it stands
    mask = token_ids % 3 == 0
    rows = pack(*pieces_of(offsets, L), L, np.random.default_rng(seed))
    batch = assemble(rows, np.arange(len(rows)), token_ids, mask)

    expected = [int(t) for a, b in itertools.pairwise(offsets) for t in token_ids[a + 1 : b]]
    used = batch.segment_ids > 0
    assert sorted(batch.targets[used].tolist()) == expected
    assert np.all(batch.targets[used] == batch.token_ids[used] + 1)
    assert np.array_equal(batch.weights[used] > 0, batch.targets[used] % 3 == 0)
    assert not batch.weights[~used].any() and not batch.targets[~used].any()
    for segments, positions, ids in zip(
        *(x.reshape(-1, L) for x in (batch.segment_ids, batch.positions, batch.token_ids)), strict=True
    ):
        for segment in range(1, segments.max(initial=0) + 1):
            where = np.flatnonzero(segments == segment)
            assert np.array_equal(positions[where], np.arange(len(where)))
            assert np.array_equal(np.diff(ids[where]), np.ones(len(where) - 1))
            assert np.array_equal(np.diff(where), np.ones(len(where) - 1))


def test_a_document_is_split_only_where_it_is_longer_than_a_row():
    starts, lengths = pieces_of(np.array([0, 17, 18, 18, 52]), 16)
    assert starts.tolist() == [0, 18, 34, 50]
    assert lengths.tolist() == [16, 16, 16, 1]


def test_packing_wastes_little():
    loader = Loader(counting_corpus(2000), row_length=256, batch_size=4, seed=0)
    assert loader.rows(0).fill > 0.98


def test_a_loader_is_a_function_of_its_position():
    corpus = counting_corpus()
    one, two = (Loader(corpus, row_length=64, batch_size=8, seed=1) for _ in range(2))
    position, seen = Position(), []
    for _ in range(2 * one.steps_per_epoch + 1):
        batch, after = one.batch(position)
        seen.append((position, batch))
        position = after
    assert position.epoch >= 2 or position.row > 0
    for position, batch in reversed(seen):
        again, _ = two.batch(position)
        assert np.array_equal(batch.token_ids, again.token_ids)
    other, _ = Loader(corpus, row_length=64, batch_size=8, seed=2).batch(Position())
    assert not np.array_equal(seen[0][1].token_ids, other.token_ids)
    assert not np.array_equal(seen[0][1].token_ids, seen[one.steps_per_epoch][1].token_ids)  # another epoch


def test_the_prefetcher_gives_the_loaders_batches_and_its_errors():
    loader = Loader(counting_corpus(), row_length=64, batch_size=8, seed=0)
    prefetcher = Prefetcher(loader, Position())
    position = Position()
    for _ in range(5):
        expected, position = loader.batch(position)
        batch, after = prefetcher.next()
        assert np.array_equal(batch.targets, expected.targets) and after == position
    prefetcher.close()

    class Broken:
        def batch(self, position):
            raise OSError("the disk is gone")

    broken = Prefetcher(Broken(), Position())
    with pytest.raises(OSError, match="the disk is gone"):
        broken.next()
    broken.close()


def test_a_corpus_is_written_and_mapped_again(tmp_path):
    corpus = counting_corpus(20)
    corpus.save(tmp_path)
    again = Corpus.open(tmp_path)
    assert isinstance(again.token_ids, np.memmap)
    for name in ("token_ids", "loss_mask", "offsets"):
        assert np.array_equal(getattr(corpus, name), getattr(again, name))
    (tmp_path / "offsets.npy").unlink()
    with pytest.raises(ValueError, match=r"offsets\.npy is missing"):
        Corpus.open(tmp_path)


def test_arrays_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="do not fit together"):
        Corpus(np.zeros(4, int), np.zeros(3, bool), np.array([0, 4]))
    with pytest.raises(ValueError, match="offsets must rise"):
        Corpus(np.zeros(4, int), np.zeros(4, bool), np.array([0, 3]))
    with pytest.raises(ValueError, match="less than batch_size"):
        Loader(counting_corpus(3), row_length=64, batch_size=64, seed=0)

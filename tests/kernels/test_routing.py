"""Routing against numpy loops: ties, padding, experts that nobody chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.grouped_matmul import route, tile_rows
from qjax.kernels.grouped_matmul.groups import max_tiles


def inputs(T: int, E: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of which many are equal and a third of the columns are never chosen; every fifth row is padding."""
    rng = np.random.default_rng(0)
    logits = (np.round(rng.standard_normal((T, E)) * 3) / 4).astype(np.float32)
    logits[:, 2::3] = -9
    return logits, np.arange(T) % 5 != 4


def in_numpy(logits, is_token, k: int, tile: int, *, is_normalized: bool, own=None):
    """position [k, T], weights [k, T], the experts of the tiles; assignment after assignment."""
    T, E = logits.shape
    first, number = own or (0, E)
    probs = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
    probs /= probs.sum(1, keepdims=True)
    chosen = np.stack([sorted(range(E), key=lambda e: (-logits[t, e], e))[:k] for t in range(T)])
    weights = np.take_along_axis(probs, chosen, 1)
    if is_normalized:
        weights /= weights.sum(1, keepdims=True)
    rows = {e: [] for e in range(number)}
    for t, j in np.ndindex(T, k):
        if is_token[t] and first <= chosen[t, j] < first + number:
            rows[chosen[t, j] - first].append((j, t))
    position, tiles = np.full((k, T), -1), []
    for e, assignments in rows.items():
        for rank, (j, t) in enumerate(assignments):
            position[j, t] = len(tiles) * tile + rank
        tiles += [e] * -(-len(assignments) // tile)
    return position, weights.T, tiles


def check(found, logits, is_token, k: int, tile: int, *, is_normalized: bool, own=None) -> None:
    position, weights, tiles = in_numpy(logits, is_token, k, tile, is_normalized=is_normalized, own=own)
    T, number = logits.shape[0], own[1] if own else logits.shape[1]
    num_tiles = max_tiles(T * k, number, tile)
    np.testing.assert_array_equal(found[0], np.where(position < 0, num_tiles * tile, position))
    np.testing.assert_allclose(found[1], weights, rtol=1e-5, atol=1e-7)
    work = np.asarray(found[2])
    assert work.shape == (1 + num_tiles,) and work[0] == len(tiles) and work[1 : 1 + len(tiles)].tolist() == tiles
    assert ((work[1:] >= 0) & (work[1:] < number)).all()  # what is past the list is fetched by nobody, but is an index


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize(("T", "E", "k"), [(1, 8, 8), (7, 16, 3), (90, 128, 8)])
def test_reference(T: int, E: int, k: int, is_normalized: bool):
    logits, is_token = inputs(T, E)
    options = {"k": k, "tile": tile_rows(T * k, E), "is_normalized": is_normalized}
    found = jax.jit(lambda *args: route(*args, **options))(logits, is_token)
    check((found.position, found.weights, found.work), logits, is_token, **options)


def test_reference_of_a_part_of_the_experts():
    logits, is_token = inputs(30, 16)
    options = {"k": 4, "tile": 8, "is_normalized": True}
    parts = [route(logits, is_token, **options, own_experts=(first, 4)) for first in (0, 4, 8, 12)]
    for first, found in zip((0, 4, 8, 12), parts, strict=True):
        check((found.position, found.weights, found.work), logits, is_token, **options, own=(first, 4))


def test_rows_and_their_sum():
    """Each row is its token; what comes back is the weighted sum, dropped assignments left out."""
    logits, is_token = inputs(20, 16)
    found = route(logits, is_token, k=3, tile=8, is_normalized=True)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((20, 5)), jnp.float32)
    rows = jax.jit(lambda found: found.rows_of(x))(found)
    kept = np.broadcast_to(is_token, (3, 20))
    np.testing.assert_array_equal(rows[np.asarray(found.position)[kept]], np.broadcast_to(x, (3, 20, 5))[kept])
    expected = np.where(is_token, found.weights, 0).sum(0)[:, None] * x
    np.testing.assert_allclose(found.join(rows), expected, rtol=1e-5, atol=1e-6)

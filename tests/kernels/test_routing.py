"""Routing against numpy loops, and the kernel against that: ties, padding, experts that nobody chooses, NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.grouped_matmul import route, tile_rows
from qjax.kernels.grouped_matmul import routing as module
from qjax.kernels.grouped_matmul.groups import max_tiles
from qjax.kernels.grouped_matmul.route_mosaic_gpu import MAX_TOKENS, route_mosaic


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
    found = jax.jit(lambda *args: route(*args, **options, implementation="reference"))(logits, is_token)
    check((found.position, found.weights, found.work), logits, is_token, **options)


def test_reference_of_a_part_of_the_experts():
    logits, is_token = inputs(30, 16)
    options = {"k": 4, "tile": 8, "is_normalized": True}
    parts = [route(logits, is_token, **options, own_experts=(first, 4)) for first in (0, 4, 8, 12)]
    for first, found in zip((0, 4, 8, 12), parts, strict=True):
        check((found.position, found.weights, found.work), logits, is_token, **options, own=(first, 4))


@pytest.mark.parametrize(
    ("T", "E", "k", "tile", "is_normalized"), [(8, 64, 3, 8, False), (72, 128, 8, 8, True), (136, 64, 2, 16, True)]
)
@pytest.mark.timeout(120)
def test_interpreted(T: int, E: int, k: int, tile: int, is_normalized: bool):
    logits, is_token = inputs(T, E)
    options = {"k": k, "tile": tile, "is_normalized": is_normalized}
    num_tiles = max_tiles(T * k, E, tile)
    found = route_mosaic(jnp.asarray(logits), jnp.asarray(is_token), **options, num_tiles=num_tiles, interpret=True)
    check(found, logits, is_token, **options)


def test_a_row_that_is_no_number_is_sent_nowhere_and_stays_none():
    logits, is_token = inputs(8, 64)
    logits[3, 5] = np.nan
    options = {"k": 3, "tile": 8, "is_normalized": True}
    found = route_mosaic(jnp.asarray(logits), jnp.asarray(is_token), **options, num_tiles=24, interpret=True)
    assert (np.asarray(found[0])[:, 3] == 24 * 8).all() and np.isnan(np.asarray(found[1])[:, 3]).all()
    is_token[3], logits[3] = False, 0
    expected = route_mosaic(jnp.asarray(logits), jnp.asarray(is_token), **options, num_tiles=24, interpret=True)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[2], expected[2])


@pytest.mark.gpu
@pytest.mark.parametrize("T", [8, 16, 64, 72, 128, 256])
def test_kernel_on_a_gpu(T: int):
    logits, is_token = inputs(T, 128)
    options = {"k": 8, "tile": tile_rows(8 * T, 128), "is_normalized": True}
    found = jax.jit(lambda *args: route(*args, **options, implementation="mosaic_gpu"))(logits, is_token)
    check((found.position, found.weights, found.work), logits, is_token, **options)


@pytest.mark.parametrize("has_source", [False, True])
def test_rows_and_their_sum(has_source: bool):
    """Each row is its token; what comes back is the weighted sum, dropped assignments left out."""
    logits, is_token = inputs(20, 16)
    found = route(logits, is_token, k=3, tile=8, is_normalized=True, implementation="reference")
    source = found.source if has_source else None
    found = module.Routing(found.position, found.weights, found.work, source)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((20, 5)), jnp.float32)
    rows = jax.jit(lambda found: found.rows_of(x, 8))(found)
    kept = np.broadcast_to(is_token, (3, 20))
    np.testing.assert_array_equal(rows[np.asarray(found.position)[kept]], np.broadcast_to(x, (3, 20, 5))[kept])
    expected = np.where(is_token, found.weights, 0).sum(0)[:, None] * x
    np.testing.assert_allclose(found.join(rows), expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_supported_is_refused():
    for T, E, k in ((MAX_TOKENS + 8, 128, 8), (8, 96, 8), (12, 128, 8), (8, 128, 17)):
        with pytest.raises(NotImplementedError, match=f"routing {T} tokens to {k} of {E} experts"):
            shapes = jnp.zeros((T, E)), jnp.ones(T, bool)
            route(*shapes, k=k, tile=8, is_normalized=True, implementation="interpret")
    with pytest.raises(NotImplementedError, match="a part of the experts"):
        args = jnp.zeros((8, 128)), jnp.ones(8, bool)
        route(*args, k=8, tile=8, is_normalized=True, own_experts=(0, 64), implementation="interpret")


def test_the_kernel_serves_nobody_before_it_was_checked(monkeypatch):
    monkeypatch.setattr("qjax.kernels.dispatch.is_hopper", lambda: True)
    run = lambda *args: route(*args, k=8, tile=8, is_normalized=True).position
    text = lambda: str(jax.make_jaxpr(lambda *args: run(*args))(jnp.zeros((8, 128)), jnp.ones(8, bool)))
    if not module.IS_CHECKED_ON_GPU:
        assert "route_kernel" not in text()
    monkeypatch.setattr(module, "IS_CHECKED_ON_GPU", True)
    assert "route_kernel" in text()

"""`grouped_int4_matmul` against float64: empty experts, poisoned padding, both projections."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.grouped_matmul import group_rows
from qjax.kernels.int4_matmul import grouped_int4_matmul, grouped_mosaic_gpu
from qjax.kernels.int4_matmul.grouped_mosaic_gpu import (
    SMEM_BYTES,
    Plan,
    grouped_int4_matmul_mosaic,
    plan,
    stage_bytes,
    staging_bytes,
)
from tests.kernels.test_grouped_matmul import choices
from tests.kernels.test_int4_matmul import inputs


def case(T: int, k: int, E: int, D: int, N: int, *, is_gated: bool, tile: int | None, dtype="bfloat16"):
    """Arguments with NaN wherever nothing may be read, the rows that count, and what is expected of them."""
    rng = np.random.default_rng(1)
    experts = choices(T, k, E)
    groups = group_rows(jnp.asarray(experts), E, tile)
    tokens = rng.standard_normal((T, D))
    x = jnp.asarray(np.concatenate([tokens, np.full((1, D), np.nan)]), dtype)[groups.source]
    sides = 1 + is_gated
    _, words, scales, weight = inputs(1, D, E * sides * N)
    of_experts = lambda a, *tail: np.asarray(a).reshape(D // 128, E, sides, -1, *tail).swapaxes(0, 1)
    words, scales = of_experts(words, 1024), of_experts(scales).copy()
    scales[np.setdiff1d(np.arange(E), experts)] = np.float32(np.nan).view(np.int32)
    if not is_gated:
        words, scales = words[:, :, 0], scales[:, :, 0]
    rows = np.asarray(groups.position).reshape(-1)
    by_expert = weight.reshape(D, E, sides, N)
    numbers = np.asarray(x, np.float64)
    y = np.stack([numbers[row] @ by_expert[:, e].reshape(D, -1) for row, e in zip(rows, experts.ravel(), strict=True)])
    if is_gated:
        gate, up = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
    return (x, jnp.asarray(words), jnp.asarray(scales), groups.work), rows, y


def relative(a, b) -> float:
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("T", "tile"), [(1, None), (20, 8), (20, 64)])
def test_reference(T: int, tile: int | None, is_gated: bool):
    args, rows, expected = case(T, 2, 8, 128, 64, is_gated=is_gated, tile=tile, dtype="float32")
    assert relative(grouped_int4_matmul(*args, is_gated=is_gated)[rows], expected) < 1e-5


# Several turns of a block, fewer stages than steps, two warpgroups, an expert with two tiles, tiles in two parts.
INTERPRETED = [
    ((5, 2, 8, 384, 128), True, 8, Plan(8, 1, 2, 1), 3),
    ((12, 2, 6, 256, 128), False, 8, Plan(8, 2, 2, 2), 132),
    ((40, 2, 3, 128, 64), True, 128, Plan(64, 1, 2, 1), 2),
    ((90, 1, 3, 128, 64), False, 128, Plan(128, 1, 2, 1), 132),
]


@pytest.mark.parametrize(("sizes", "is_gated", "tile", "cut", "num_sms"), INTERPRETED, ids=str)
@pytest.mark.timeout(120)
def test_interpreted(monkeypatch, sizes, is_gated: bool, tile: int, cut: Plan, num_sms: int):
    monkeypatch.setattr(grouped_mosaic_gpu, "NUM_SMS", num_sms)
    args, rows, expected = case(*sizes, is_gated=is_gated, tile=tile)
    found = grouped_int4_matmul_mosaic(*args, is_gated=is_gated, interpret=True, cut=cut)
    assert found.dtype == jnp.bfloat16 and relative(found[rows], expected) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("T", [1, 8, 128, 2000])
def test_kernel_on_a_gpu(T: int, is_gated: bool):
    args, rows, expected = case(T, 8, 32, 256, 768, is_gated=is_gated, tile=None)
    assert relative(grouped_int4_matmul(*args, is_gated=is_gated, implementation="mosaic_gpu")[rows], expected) < 4e-3


# 30B-A3B, 235B-A22B: D and F; tensor parallel leaves a share of F on each device.
@pytest.mark.parametrize(("D", "F"), [(2048, 768), (2048, 384), (4096, 1536), (4096, 192)])
@pytest.mark.parametrize(("tile", "max_tiles"), [(8, 8), (8, 128), (16, 184), (64, 190), (128, 600)])
def test_every_cut_fits_shared_memory_and_covers_the_columns(tile: int, max_tiles: int, D: int, F: int):
    for columns, is_gated, depth in ((F, True, D), (D, False, F)):
        cut = plan(tile, max_tiles, depth, columns, is_gated)
        assert columns % (64 * cut.num_warpgroups) == 0 == tile % cut.rows
        assert cut.num_stages >= max(2, cut.unroll) and depth // 128 % cut.unroll == 0
        used = cut.num_stages * stage_bytes(cut.rows, cut.num_warpgroups, is_gated)
        assert used + staging_bytes(cut.rows, cut.num_warpgroups) <= SMEM_BYTES


def test_what_does_not_fit_is_refused():
    (x, words, scales, work), _, _ = case(4, 2, 4, 128, 64, is_gated=False, tile=8)
    for wrong in ((x[:, :64], words, scales, work), (x, words, scales[:2], work), (x, words[..., :512], scales, work)):
        with pytest.raises(ValueError, match="grouped_int4_matmul"):
            grouped_int4_matmul(*wrong)
    with pytest.raises(ValueError, match="grouped_int4_matmul"):
        grouped_int4_matmul(x, words, scales, work, is_gated=True)
    with pytest.raises(NotImplementedError, match="float32"):
        grouped_int4_matmul(x.astype(jnp.float32), words, scales, work, implementation="interpret")

"""`grouped_fp8_matmul` against its arithmetic in float64: empty experts, poisoned padding, scales of cut blocks."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.kernels.fp8_matmul import grouped_fp8_matmul, grouped_mosaic_gpu
from qjax.kernels.fp8_matmul.grouped_mosaic_gpu import SMEM_BYTES, Plan, grouped_fp8_matmul_mosaic, plan
from qjax.kernels.fp8_matmul.reference import grouped_fp8_product
from qjax.kernels.grouped_matmul import group_rows
from tests.kernels.test_fp8_matmul import in_numpy, relative
from tests.kernels.test_grouped_matmul import choices

E4M3 = ml_dtypes.float8_e4m3fn


def case(T: int, k: int, E: int, D: int, N: int, *, is_gated: bool, tile: int | None, block=(128, 128)):
    """Arguments with NaN wherever nothing may be read, the rows that count, and a function to the expected ones."""
    rng = np.random.default_rng(1)
    experts = choices(T, k, E)
    groups = group_rows(jnp.asarray(experts), E, tile)
    tokens = rng.standard_normal((T, D)) * np.exp2(rng.integers(-6, 6, (T, D // 64)).repeat(64, axis=1))
    tokens[T // 2, D // 2] = 100
    x = jnp.asarray(np.concatenate([tokens, np.full((1, D), np.nan)]), jnp.bfloat16)[groups.source]
    outputs = (2, N) if is_gated else (N,)
    w = (rng.standard_normal((E, *outputs, D)) * D**-0.5).astype(E4M3)
    scale = rng.uniform(0.5, 2, (E, *outputs[:-1], N // block[0], D // block[1])).astype(np.float32)
    unused = np.setdiff1d(np.arange(E), experts)
    w[unused], scale[unused] = np.nan, np.nan
    rows = np.asarray(groups.position).reshape(-1)

    def expected(product) -> np.ndarray:
        out = np.empty((len(rows), N))
        for i, (row, e) in enumerate(zip(rows, experts.ravel(), strict=True)):
            sides = zip(w[e].reshape(-1, N, D), scale[e].reshape(-1, N // block[0], D // block[1]), strict=True)
            y = [product(x[row][None], *side)[0] for side in sides]
            out[i] = y[0] if not is_gated else y[0] / (1 + np.exp(-y[0])) * y[1]
        return out

    return (x, jnp.asarray(w), jnp.asarray(scale), groups.work), rows, expected


def weight_only(x, w, scale) -> np.ndarray:
    full = scale.repeat(w.shape[0] // scale.shape[0], 0).repeat(w.shape[1] // scale.shape[1], 1)
    return np.asarray(x, np.float64) @ (w.astype(np.float64) * full).T


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("T", "tile"), [(1, None), (20, 8), (20, 64)])
def test_reference(T: int, tile: int | None, is_gated: bool):
    args, rows, expected = case(T, 2, 8, 128, 64, is_gated=is_gated, tile=tile, block=(64, 128))
    found = np.asarray(grouped_fp8_matmul(*args, is_gated=is_gated), np.float64)[rows]
    assert np.isfinite(found).all() and relative(found, expected(weight_only)) < 1e-2
    found = np.asarray(grouped_fp8_product(*args, is_gated=is_gated), np.float64)[rows]
    assert relative(found, expected(in_numpy)) < 4e-3


# Several turns of a block, fewer stages than steps, two warpgroups, an expert with two tiles; rounded before or inside.
INTERPRETED = [
    ((5, 2, 8, 384, 128), True, 8, (128, 128), Plan(1, 64, 2, False), 3),
    ((24, 2, 6, 192, 128), False, 8, (64, 64), Plan(1, 128, 2, False), 132),
    ((70, 2, 3, 256, 128), True, 128, (128, 128), Plan(2, 128, 2, True), 2),
    ((30, 2, 3, 128, 192), False, 64, (64, 128), Plan(1, 64, 3, True), 132),
]


@pytest.mark.parametrize(("sizes", "is_gated", "tile", "block", "cut", "num_sms"), INTERPRETED, ids=str)
@pytest.mark.timeout(120)
def test_interpreted(monkeypatch, sizes, is_gated: bool, tile: int, block, cut: Plan, num_sms: int):
    monkeypatch.setattr(grouped_mosaic_gpu, "NUM_SMS", num_sms)
    args, rows, expected = case(*sizes, is_gated=is_gated, tile=tile, block=block)
    found = grouped_fp8_matmul_mosaic(*args, is_gated=is_gated, interpret=True, cut=cut)
    assert found.dtype == jnp.bfloat16
    assert relative(np.asarray(found, np.float64)[rows], expected(in_numpy)) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("T", [1, 8, 128, 2000])
def test_kernel_on_a_gpu(T: int, is_gated: bool):
    args, rows, _ = case(T, 8, 32, 512, 768, is_gated=is_gated, tile=None)
    found, expected = (
        np.asarray(f(*args, is_gated=is_gated, **options), np.float64)[rows]
        for f, options in ((grouped_fp8_matmul, {"implementation": "mosaic_gpu"}), (grouped_fp8_product, {}))
    )
    assert relative(found, expected) < 6e-3


# 30B-A3B, 235B-A22B: D and F; tensor parallel leaves a share of F on each device, and smaller blocks.
@pytest.mark.parametrize(("D", "F"), [(2048, 768), (2048, 384), (2048, 192), (4096, 1536), (4096, 192)])
@pytest.mark.parametrize("tile", [8, 16, 32, 64, 128])
def test_every_cut_fits_shared_memory_and_covers_the_columns(tile: int, D: int, F: int):
    of_f = 128 if F % 128 == 0 else 64
    for columns, is_gated, block in ((F, True, (of_f, 128)), (D, False, (128, of_f))):
        cut = plan(tile, columns, *block, is_gated)
        rows, w_rows = cut.num_warpgroups * 64, (1 + is_gated) * cut.tile_n
        came = 0 if cut.is_rounded else 2 * tile
        stage = (rows + came + w_rows) * block[1] + max(1024, 4 * rows)
        assert columns % cut.tile_n == 0 and rows >= tile and cut.num_stages >= 2 and cut.is_rounded == (tile > 32)
        assert cut.num_stages * stage + cut.num_warpgroups * 64 * 64 * 2 <= SMEM_BYTES
        assert w_rows <= 256  # registers of a thread for the sums


def test_what_does_not_fit_is_refused():
    args, _, _ = case(4, 2, 4, 128, 128, is_gated=False, tile=8)
    x, w, scale, work = args
    for wrong in ((x[:, :64], w, scale, work), (x, w.astype(jnp.bfloat16), scale, work), (x, w, scale[:2], work)):
        with pytest.raises(ValueError, match="grouped_fp8_matmul"):
            grouped_fp8_matmul(*wrong)
    with pytest.raises(ValueError, match="grouped_fp8_matmul"):
        grouped_fp8_matmul(*args, is_gated=True)
    with pytest.raises(NotImplementedError, match="scales of 32 x 128"):
        plan(8, 96, 32, 128, True)
    with pytest.raises(NotImplementedError, match="float32"):
        grouped_fp8_matmul(x.astype(jnp.float32), w, scale, work, implementation="interpret")

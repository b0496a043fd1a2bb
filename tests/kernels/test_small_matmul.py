"""`small_matmul` against float64, with rows and parts of the sum that do not divide evenly."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.small_matmul import mosaic_gpu, small_matmul
from qjax.kernels.small_matmul.mosaic_gpu import NUM_SMS, SMEM_BYTES, Plan, plan, small_matmul_mosaic

CUTS = [
    (3, 320, 128, Plan(64, 1, 64, 3, 3)),
    (70, 128, 128, Plan(128, 2, 128, 1, 2)),
    (70, 192, 256, Plan(128, 2, 64, 2, 2, sharers=2)),
]


def inputs(M: int, D: int, N: int):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    return make(M, D), make(D, N)


def check(parts, x, w) -> None:
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert parts.dtype == (x.dtype if parts.shape[0] == 1 else jnp.float32)
    out = np.asarray(parts, np.float64).sum(axis=0)
    assert np.abs(out - expected).max() < (0.01 if parts.shape[0] == 1 else 1e-5) * np.abs(expected).max()


@pytest.mark.parametrize(("M", "D", "N", "cut"), CUTS, ids=str)
@pytest.mark.timeout(120)
def test_interpreted_parts_add_up(M: int, D: int, N: int, cut: Plan):
    x, w = inputs(M, D, N)
    check(small_matmul_mosaic(x, w, interpret=True, cut=cut), x, w)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("sharers", [1, 2])
def test_interpreted_gated_product(sharers: int):
    """Of columns of gate first, then of up; more steps than stages."""
    x, w = inputs(40, 192, 512)
    out = small_matmul_mosaic(x, w, interpret=True, is_gated=True, cut=Plan(64, 1, 128, 1, 2, sharers))
    gate, up = np.split(np.asarray(x, np.float64) @ np.asarray(w, np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    assert out.shape == (1, 40, 256) and out.dtype == x.dtype
    assert np.abs(np.asarray(out[0], np.float64) - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("implementation", ["reference", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("M", [1, 33, 128, 200])
def test_parts_add_up(M: int, implementation: str):
    x, w = inputs(M, 1024, 2048)
    check(small_matmul(x, w, implementation=implementation), x, w)


SHAPES = [(4096, 4096), (4096, 24576), (12288, 4096), (1024, 6144), (2560, 19456)]


@pytest.mark.parametrize(("D", "N"), SHAPES)
@pytest.mark.parametrize("M", [9, 64, 128])
def test_every_cut_fits_shared_memory_and_covers_the_columns(M: int, D: int, N: int):
    check_cut(plan(M, D, N, 2), M, D, N, is_gated=False)


def check_cut(cut: Plan, M: int, D: int, N: int, *, is_gated: bool) -> None:
    columns = cut.tile_n // (1 + is_gated)
    width = columns // cut.num_parts if cut.is_joined else 64
    staging = cut.num_warpgroups * 64 * width * (4 if cut.num_parts > 1 and not cut.is_joined else 2)
    assert N % (cut.tile_n * cut.sharers) == 0 and cut.block_rows >= M and 1 <= cut.num_parts <= D // 64
    assert cut.num_stages >= 2 and cut.num_stages * (cut.block_rows + cut.tile_n) * 128 + staging <= SMEM_BYTES
    assert columns % 64 == 0 and cut.sharers * (cut.num_parts if cut.is_joined else 1) <= 8  # blocks of a cluster
    assert not cut.is_joined or (width % 16 == 0 and N // cut.tile_n * cut.num_parts <= NUM_SMS)
    assert cut.block_rows // cut.num_warpgroups * cut.tile_n // 128 <= (96 if cut.num_warpgroups == 3 else 192)


@pytest.mark.parametrize("is_gated", [False, True])
def test_every_cut_of_the_tables_can_be_made(is_gated: bool, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "IS_CHECKED_ON_GPU", True)
    for M, D, N in mosaic_gpu.GATED_CUTS if is_gated else mosaic_gpu.CUTS:
        check_cut(plan.__wrapped__(M, D, N, 2, is_gated), M, D, N, is_gated=is_gated)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="small_matmul"):
        small_matmul(jnp.zeros((2, 64)), jnp.zeros((128, 64)))

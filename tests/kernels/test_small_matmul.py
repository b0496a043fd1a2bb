"""`small_matmul` against float64, with rows and parts of the sum that do not divide evenly."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.small_matmul import small_matmul
from qjax.kernels.small_matmul.mosaic_gpu import SMEM_BYTES, Plan, gated_plan, plan, small_matmul_mosaic

CUTS = [
    (3, 320, 128, Plan(64, 1, 64, 3, 3)),
    (70, 128, 128, Plan(128, 2, 128, 1, 2)),
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
@pytest.mark.parametrize("cut", [Plan(64, 1, 128, 1, 2), None], ids=["gated", "after"])
def test_interpreted_gated_product(cut: Plan | None):
    """Of columns of gate first, then of up; more steps than stages. For so few columns there is no gated plan."""
    x, w = inputs(40, 192, 512)
    check_gated(small_matmul_mosaic(x, w, interpret=True, is_gated=True, cut=cut), x, w)


def check_gated(parts, x, w) -> None:
    gate, up = np.split(np.asarray(x, np.float64) @ np.asarray(w, np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    assert parts.shape == (1, *expected.shape) and parts.dtype == x.dtype
    assert np.abs(np.asarray(parts[0], np.float64) - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("implementation", ["reference", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("M", [1, 33, 128, 200])
def test_parts_add_up(M: int, implementation: str):
    x, w = inputs(M, 1024, 2048)
    check(small_matmul(x, w, implementation=implementation), x, w)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("M", [33, 128])
def test_gated_product(M: int, implementation: str):
    x, w = inputs(M, 128, 24576)
    check_gated(small_matmul(x, w, is_gated=True, implementation=implementation), x, w)


SHAPES = [(4096, 4096), (4096, 24576), (12288, 4096), (1024, 6144), (2560, 19456)]


@pytest.mark.parametrize(("D", "N"), SHAPES)
@pytest.mark.parametrize("M", [9, 64, 128])
def test_every_cut_fits_shared_memory_and_covers_the_columns(M: int, D: int, N: int):
    for cut in (plan(M, D, N, 2), gated_plan(M, D, N) or plan(M, D, N, 2)):
        staging = cut.num_warpgroups * 64 * 64 * (4 if cut.num_parts > 1 else 2)
        assert N % cut.tile_n == 0 and cut.block_rows >= M and 1 <= cut.num_parts <= D // 64
        assert cut.num_stages >= 2 and cut.num_stages * (cut.block_rows + cut.tile_n) * 128 + staging <= SMEM_BYTES
        assert cut.block_rows // cut.num_warpgroups * cut.tile_n // 128 <= (96 if cut.num_warpgroups == 3 else 192)


def test_where_swiglu_is_inside_the_product():
    """8B with 9 to 128 rows, and 32B, whose tiles fill two turns as well. 4B has too few, 14B four in a second turn."""
    assert gated_plan(32, 4096, 24576) == Plan(64, 1, 256, 1, 5) and gated_plan(128, 5120, 51200)
    assert gated_plan(128, 4096, 24576) == Plan(128, 2, 256, 1, 4)
    others = [(8, 4096, 24576), (129, 4096, 24576), (32, 1024, 6144), (32, 2560, 19456), (32, 5120, 34816)]
    assert not any(gated_plan(*shape) for shape in others)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="small_matmul"):
        small_matmul(jnp.zeros((2, 64)), jnp.zeros((128, 64)))

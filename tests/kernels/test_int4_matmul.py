"""`int4_matmul` against float64, its packing by hand, and every cut's size."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.int4_matmul import dequantize, int4_matmul, pack_scales, pack_weights
from qjax.kernels.int4_matmul.mosaic_gpu import MAX_ROWS, ROW_TILE, SMEM_BYTES, Plan, int4_matmul_mosaic, plan
from qjax.kernels.int4_matmul.reference import unpack_scales, unpack_weights

# Padded rows (which the interpreted kernel gets as NaN), parts of unequal length, two groups at once, two row tiles.
CUTS = [
    (3, 640, 128, Plan(8, 2, 2, 3, 1)),
    (5, 512, 64, Plan(8, 1, 2, 2, 2)),
    (20, 128, 64, Plan(16, 1, 1, 2, 1)),
    (70, 128, 64, Plan(72, 1, 1, 2, 1)),
]


def inputs(M: int, D: int, N: int, dtype=jnp.bfloat16):
    """x, the two packed arrays, and the weight [D, N] in float64."""
    rng = np.random.default_rng(0)
    q = rng.integers(0, 16, (D, N)).astype(np.uint8)
    zeros = rng.integers(0, 17, (D // 128, N))
    scales = (0.01 * (1 + rng.random((D // 128, N)))).astype(np.float16)
    weight = (q.astype(np.float64) - zeros.repeat(128, axis=0)) * scales.astype(np.float64).repeat(128, axis=0)
    x = jnp.asarray(rng.standard_normal((M, D)), dtype)
    return x, jnp.asarray(pack_weights(q)), jnp.asarray(pack_scales(scales, zeros)), weight


def check(parts, x, weight, rounded: float) -> None:
    """`rounded`: relative error allowed of one part in x's dtype."""
    expected = np.asarray(x, np.float64) @ weight
    assert parts.dtype == (x.dtype if parts.shape[0] == 1 else jnp.float32)
    assert parts.shape[1:] == expected.shape
    out = np.asarray(parts, np.float64).sum(axis=0)
    assert np.abs(out - expected).max() < (rounded if parts.shape[0] == 1 else 1e-6) * np.abs(expected).max()


@pytest.mark.parametrize(("M", "D", "N", "cut"), CUTS, ids=str)
@pytest.mark.timeout(120)
def test_interpreted_parts_add_up(M: int, D: int, N: int, cut: Plan):
    *arrays, weight = inputs(M, D, N)
    check(int4_matmul_mosaic(*arrays, interpret=True, cut=cut), arrays[0], weight, 0.004)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("M", [1, 5, 33, 128, 200])
def test_parts_add_up(M: int, implementation: str):
    *arrays, weight = inputs(M, 1024, 384)
    check(int4_matmul(*arrays, implementation=implementation), arrays[0], weight, 0.006)


def test_numbers_are_those_of_the_formula():
    """(q - zero) * scale in float32, rounded once, bit by bit."""
    _, words, scales_zeros, weight = inputs(1, 384, 192)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        expected = jnp.asarray(weight.T.astype(np.float32)).astype(dtype)
        np.testing.assert_array_equal(np.asarray(dequantize(words, scales_zeros, dtype)), np.asarray(expected))


def test_words_by_hand():
    """A thread's word has the numbers that wgmma's left operand asks of it, in pairs (p, p + 4)."""
    q = np.random.default_rng(1).integers(0, 16, (256, 192)).astype(np.uint8)
    words = pack_weights(q)
    assert words.shape == (2, 3, 1024) and words.dtype == np.int32
    for group, cell, thread, word in ((0, 0, 0, 0), (1, 2, 77, 3), (1, 1, 127, 7)):
        warp, lane = divmod(thread, 32)
        bits = int(words[group, cell, (word // 4 * 128 + thread) * 4 + word % 4]) & 0xFFFFFFFF
        for output_half, input_half, neighbour in np.ndindex(2, 2, 2):
            column = 64 * cell + 16 * warp + 8 * output_half + lane // 4
            row = 128 * group + 16 * word + 8 * input_half + 2 * (lane % 4) + neighbour
            assert q[row, column] == bits >> (4 * (output_half + 2 * input_half + 4 * neighbour)) & 15
    np.testing.assert_array_equal(np.asarray(unpack_weights(jnp.asarray(words))), q.T)


def test_scales_keep_every_bit_of_sixteen():
    scales = np.concatenate([np.float16([6e-8, 1e-4, 0.0371, 60000]), np.float16(np.random.default_rng(0).random(60))])
    zeros = np.arange(64) % 17
    found, zero = unpack_scales(jnp.asarray(pack_scales(scales[None], zeros[None])))
    np.testing.assert_array_equal(np.asarray(found)[0], scales.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(zero)[0], zeros)


@pytest.mark.parametrize(("D", "N"), [(4096, 6144), (4096, 4096), (12288, 4096), (1024, 6144), (2432, 2560), (128, 64)])
@pytest.mark.parametrize("M", [1, 8, 17, 32, 64, 128, 200, 256])
def test_every_cut_fits_shared_memory_and_covers_the_sum(M: int, D: int, N: int):
    cut = plan(M, D, N, 2)
    stage = cut.num_warpgroups * (1024 + 64) * 4 + cut.rows * 256
    staging = cut.num_warpgroups * min(cut.rows, 64) * 64 * 4
    assert cut.num_stages >= 2 and cut.num_stages * stage + staging <= SMEM_BYTES
    assert cut.rows % 8 == 0 and cut.rows <= ROW_TILE and -(-M // cut.rows) <= 2
    assert N % (64 * cut.num_warpgroups) == 0
    assert D // 128 % cut.unroll == 0 and cut.num_parts * cut.unroll <= D // 128 and cut.num_stages >= cut.unroll


def test_more_rows_are_left_to_xla():
    with pytest.raises(NotImplementedError, match="rows"):
        plan(MAX_ROWS + 1, 4096, 4096, 2)


def test_shapes_that_do_not_fit_are_refused():
    x, words, scales_zeros, _ = inputs(1, 256, 64)
    for wrong in ((x[:, :128], words, scales_zeros), (x, words, scales_zeros[:1]), (x, words[..., :512], scales_zeros)):
        with pytest.raises(ValueError, match="int4_matmul"):
            int4_matmul(*wrong)

"""`fp8_matmul` against its arithmetic in numpy, and how far rounding the activations takes it from their product."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.kernels.fp8_matmul import fp8_matmul, mosaic_gpu
from qjax.kernels.fp8_matmul.mosaic_gpu import SMEM_BYTES, Plan, fp8_matmul_mosaic, num_buffers, plan
from qjax.kernels.fp8_matmul.reference import fp8_product, quantize_rows

E4M3 = ml_dtypes.float8_e4m3fn
# Rows, D, N, the block that shares a scale, the cut, and how many thread blocks there are. The interpreter fills
# unused shared memory with NaN: here rows 8 to 63, and 70 to 127 are zeros.
CASES = [
    (3, 512, 128, (128, 128), Plan(64, 64, 3, 2, False), 2),
    (70, 320, 128, (64, 64), Plan(128, 128, 1, 2, True), 132),
    (300, 256, 128, (128, 128), Plan(256, 128, 1, 2, True), 1),
    (70, 384, 128, (128, 128), Plan(128, 64, 1, 2, True, is_paired=True), 2),
]


def inputs(M: int, D: int, N: int, block: tuple[int, int] = (128, 128)):
    """x has groups of very different sizes, one outlier and a row of zeros; so have the scales."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((M, D)) * np.exp2(rng.integers(-6, 6, (M, D // 64)).repeat(64, axis=1))
    x[M // 2, D // 2] = 1000
    x[M - 1] = 0
    w = rng.standard_normal((N, D)).astype(E4M3)
    scale = rng.uniform(0.01, 0.04, (N // block[0], D // block[1])).astype(np.float32)
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(w), jnp.asarray(scale)


def in_numpy(x, w, scale) -> np.ndarray:
    """Block by block in float64; only the rounding of x to e4m3 is in float32."""
    x, w, scale = np.asarray(x, np.float32), np.asarray(w, np.float64), np.asarray(scale, np.float64)
    group, rows = x.shape[1] // scale.shape[1], w.shape[0] // scale.shape[0]
    out = np.zeros((x.shape[0], w.shape[0]))
    for k in range(scale.shape[1]):
        part = slice(k * group, (k + 1) * group)
        amax = np.maximum(np.abs(x[:, part]).max(axis=1, keepdims=True), np.float32(1e-10))
        q = (x[:, part] * (np.float32(448) / amax)).astype(E4M3).astype(np.float64)
        out += (q @ w[:, part].T) * (amax / 448.0) * scale[:, k].repeat(rows)
    return out


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def check(parts, x, w, scale) -> None:
    is_rounded = parts.shape[0] == 1
    assert parts.dtype == (x.dtype if is_rounded else jnp.float32)
    assert np.isfinite(np.asarray(parts, np.float32)).all()
    assert relative(np.asarray(parts, np.float64).sum(axis=0), in_numpy(x, w, scale)) < (4e-3 if is_rounded else 1e-5)


@pytest.mark.parametrize(("M", "D", "N", "block", "cut", "num_sms"), CASES, ids=str)
@pytest.mark.timeout(120)
def test_interpreted(monkeypatch, M: int, D: int, N: int, block, cut: Plan, num_sms: int):
    monkeypatch.setattr(mosaic_gpu, "NUM_SMS", num_sms)
    x, w, scale = inputs(M, D, N, block)
    check(fp8_matmul_mosaic(x, w, scale, interpret=True, cut=cut), x, w, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(128, 128), (64, 128), (128, 64)], ids=str)
@pytest.mark.parametrize("M", [1, 8, 31, 33, 64, 65, 128, 129, 256, 300])
def test_native(M: int, block: tuple[int, int]):
    x, w, scale = inputs(M, 1280, 768, block)
    check(fp8_matmul(x, w, scale, implementation="mosaic_gpu"), x, w, scale)


def test_arithmetic_of_the_kernel_in_jnp():
    x, w, scale = inputs(5, 384, 256)
    assert relative(fp8_product(x, w, scale), in_numpy(x, w, scale)) < 1e-6


def test_rows_are_quantised_within_half_a_step():
    x, _, _ = inputs(6, 512, 128)
    q, scale = quantize_rows(x, 128)
    numbers = np.asarray(q, np.float32).reshape(6, 4, 128) * np.asarray(scale).T[:, :, None]
    groups = np.asarray(x, np.float32).reshape(6, 4, 128)
    amax = np.abs(groups).max(axis=2, keepdims=True)
    # e4m3 has 3 bits behind the leading one, and 2^-9 is its smallest step.
    assert (np.abs(numbers - groups) <= np.maximum(np.abs(groups) / 16, amax / 448 / 2**10) * 1.001).all()
    np.testing.assert_allclose(np.abs(numbers).max(axis=2, keepdims=True), amax, rtol=1e-6)


def test_close_to_the_weight_only_product():
    """With activations of one size: what FP8's 3 bits cost, averaged over D."""
    rng = np.random.default_rng(1)
    _, w, scale = inputs(2, 1024, 256)
    x = jnp.asarray(rng.standard_normal((16, 1024)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ (np.asarray(w, np.float64) * np.asarray(scale).repeat(128, 0).repeat(128, 1)).T
    assert relative(fp8_matmul(x, w, scale, implementation="reference")[0], exact) < 4e-3
    assert relative(fp8_product(x, w, scale), exact) < 0.03


@pytest.mark.parametrize(
    ("D", "N"), [(4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096), (1024, 6144), (1216, 2560), (2560, 2432)]
)
@pytest.mark.parametrize("M", [1, 33, 128, 256, 528, 2048])
def test_every_cut_fits_shared_memory(M: int, D: int, N: int):
    block_n, block_d = (64 if size in (1216, 2432) else 128 for size in (N, D))
    cut = plan(M, D, N, block_n, block_d)
    came = 0 if cut.is_rounded else 2 * block_d * -(-M // 8) * 8
    stage = cut.block_rows * (block_d + 4) + came + cut.tile_n * block_d
    assert N // cut.tile_n % (2 if cut.is_paired else 1) == 0 == N % cut.tile_n and 1 <= cut.num_parts <= D // block_d
    assert cut.num_stages >= 2
    assert cut.num_stages * stage + 2 * num_buffers(cut.block_rows) * 64 * 128 <= SMEM_BYTES


def test_what_does_not_fit_is_refused():
    x, w, scale = inputs(2, 256, 128)
    with pytest.raises(ValueError, match="fp8_matmul"):
        fp8_matmul(x[:, :128], w, scale)
    with pytest.raises(ValueError, match="fp8_matmul"):
        fp8_matmul(x, w.astype(jnp.bfloat16), scale)
    with pytest.raises(NotImplementedError, match="scales of 32 x 128"):
        plan(1, 256, 96, 32, 128)
    with pytest.raises(NotImplementedError, match="float32"):
        fp8_matmul(x.astype(jnp.float32), w, scale, implementation="mosaic_gpu")

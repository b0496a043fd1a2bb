"""Residual and norm on Hopper: one block a row, which stays in registers between the two."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))  # one trace and one kernel for all layers
def add_rms_norm_mosaic(
    x: jax.Array, parts: jax.Array, weight: jax.Array, *, eps: float, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    T, D = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16) or D % 256 or D > 8192:
        raise NotImplementedError(f"the kernel takes rows of a multiple of 256 2-byte numbers, not {D} x {x.dtype}")
    vector = plgpu.Layout.WG_STRIDED((D,), vec_size=max(n for n in (2, 4, 8) if D % (128 * n) == 0))

    def add_rms_norm_kernel(x_ref, parts_ref, weight_ref, sum_ref, out_ref):
        row = lax.axis_index("row")
        load = lambda ref: plgpu.load(ref, layout=vector)
        delta = load(parts_ref.at[0, row])
        for part in range(1, parts.shape[0]):
            delta = delta + load(parts_ref.at[part, row])
        summed = load(x_ref.at[row]) + delta.astype(x.dtype)
        sum_ref[row] = summed
        x32 = summed.astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(x32 * x32) / D + eps)
        out_ref[row] = (x32 * scale).astype(x.dtype) * load(weight_ref)

    added, normed = plgpu.kernel(
        add_rms_norm_kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        grid=(T,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, parts, weight)
    return added, normed

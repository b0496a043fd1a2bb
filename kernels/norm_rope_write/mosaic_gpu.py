"""The operation on Hopper: XLA norms and rotates, one block a token moves its rows into the pages with TMA."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.elementwise import norm_and_rotate


def norm_rope_write_mosaic(kv, qkv, norms, cos, sin, slots, *, eps: float, layer: jax.Array | int, interpret: bool):
    q, k, v = norm_and_rotate(qkv, norms, eps, cos, sin)
    return q, _write(kv, k, v, slots, layer=layer, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("interpret",))  # one trace and one kernel for all layers
def _write(
    kv: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, layer: jax.Array | int, interpret: bool
) -> jax.Array:
    L, _, P, K, S, H = kv.shape
    T = slots.shape[0]
    if H * kv.dtype.itemsize % 16:
        raise NotImplementedError(f"TMA moves rows of a multiple of 16 bytes, not {H} x {kv.dtype}")

    def kv_write_kernel(layer_ref, k_ref, v_ref, slots_ref, kv_ref, k_smem, v_smem, barrier):
        token = lax.axis_index("token")
        slot = slots_ref[token]

        @pl.when(slot >= 0)
        def _():
            plgpu.copy_gmem_to_smem(k_ref.at[token], k_smem, barrier)
            plgpu.copy_gmem_to_smem(v_ref.at[token], v_smem, barrier)
            plgpu.barrier_wait(barrier)
            page, offset = lax.div(slot, jnp.int32(S)), lax.rem(slot, jnp.int32(S))
            k_page = 2 * layer_ref[0] * P + page
            plgpu.copy_smem_to_gmem(k_smem, kv_ref.at[k_page, :, offset])
            plgpu.copy_smem_to_gmem(v_smem, kv_ref.at[k_page + P, :, offset])
            plgpu.wait_smem_to_gmem(0)

    # A Ref that the kernel writes is aliased to the result, which is what makes the write happen in place. TMA knows
    # at most five axes, hence the flat view of (layer, keys or values, page).
    kv_ref = jax.new_ref(kv.reshape(L * 2 * P, K, S, H))
    row = plgpu.SMEM((K, H), kv.dtype)
    plgpu.kernel(
        kv_write_kernel,
        out_type=(),
        scratch_types=[row, row, plgpu.Barrier(num_arrivals=2)],
        grid=(T,),
        grid_names=("token",),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(jnp.full((1,), layer, jnp.int32), k.astype(kv.dtype), v.astype(kv.dtype), slots, kv_ref)
    return jax.freeze(kv_ref).reshape(kv.shape)

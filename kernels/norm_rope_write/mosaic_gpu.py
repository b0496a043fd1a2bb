"""The operation on Hopper: one block a token. Its rows come and go by TMA, and stay in registers between."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

# [rows, 64] in which each warp holds whole rows, so that a row is loaded, summed and stored by one warp.
HALF = 64
MATRIX = plgpu.Layout.TILED(Tiling(((4, HALF), (2,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))  # one trace and one kernel for all layers
def norm_rope_write_mosaic(kv, qkv, norms, cos, sin, slots, *, eps: float, layer: jax.Array | int, interpret: bool):
    L, _, P, K, S, H = kv.shape
    T, _, row_kinds, _ = qkv.shape
    G, dtype = row_kinds - 2, qkv.dtype
    if dtype not in (jnp.bfloat16, jnp.float16) or kv.dtype != dtype or 2 * HALF != H:
        raise NotImplementedError(f"the kernel takes heads of 128 2-byte numbers, not {H} x {dtype}")
    num_rows = K * row_kinds
    padded = -(-num_rows // 4) * 4  # whole rounds of the four warps
    weights = [] if norms is None else [w.reshape(2, HALF) for w in norms]

    def norm_rope_write_kernel(layer_ref, qkv_ref, cos_ref, sin_ref, slots_ref, *refs):
        weight_refs, (kv_ref, q_ref, in_smem, out_smem, barrier) = refs[: len(weights)], refs[len(weights) :]
        token = lax.axis_index("token")
        plgpu.copy_gmem_to_smem(qkv_ref.at[token], in_smem.at[pl.ds(0, num_rows)], barrier)
        slot = slots_ref[token]
        page, offset = lax.div(slot, jnp.int32(S)), lax.rem(slot, jnp.int32(S))
        k_page = 2 * layer_ref[0] * P + page

        def across(ref) -> jax.Array:
            columns = plgpu.load(ref, layout=MATRIX.reduce(0), optimized=False)  # "optimized" is about shared memory
            return lax.broadcast_in_dim(columns, (padded, HALF), [1])

        cos, sin = across(cos_ref.at[token]), across(sin_ref.at[token])
        plgpu.barrier_wait(barrier)
        # the two numbers of a pair that is rotated lie in one thread
        low, high = (plgpu.load(in_smem.at[:, pl.ds(c, HALF)], layout=MATRIX).astype(jnp.float32) for c in (0, HALF))
        if weights:
            mean = (jnp.sum(low * low, axis=1) + jnp.sum(high * high, axis=1)) / H
            scale = lax.broadcast_in_dim(lax.rsqrt(mean + eps), (padded, HALF), [0])
            row = plgpu.broadcasted_iota(jnp.int32, (padded, HALF), 0, layout=MATRIX)
            is_key = lax.rem(row, jnp.int32(row_kinds)) == G
            q_low, q_high, k_low, k_high = (across(ref.at[part]) for ref in weight_refs for part in (0, 1))
            low = ((low * scale).astype(dtype) * jnp.where(is_key, k_low, q_low)).astype(jnp.float32)
            high = ((high * scale).astype(dtype) * jnp.where(is_key, k_high, q_high)).astype(jnp.float32)
        out_smem[:, pl.ds(0, HALF)] = (low * cos - high * sin).astype(dtype)
        out_smem[:, pl.ds(HALF, HALF)] = (high * cos + low * sin).astype(dtype)
        plgpu.commit_smem()
        for head in range(K):
            first_row = head * row_kinds
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(first_row, G)], q_ref.at[token, head])

        @pl.when(slot >= 0)
        def _():
            for head in range(K):
                key_row = head * row_kinds + G
                k_row, v_row = out_smem.at[pl.ds(key_row, 1)], in_smem.at[pl.ds(key_row + 1, 1)]
                plgpu.copy_smem_to_gmem(k_row, kv_ref.at[k_page, pl.ds(head, 1), offset])
                plgpu.copy_smem_to_gmem(v_row, kv_ref.at[k_page + P, pl.ds(head, 1), offset])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # A Ref that the kernel writes is aliased to the result, which is what makes the write happen in place. TMA knows
    # at most five axes, hence the flat view of (layer, keys or values, page).
    kv_ref = jax.new_ref(kv.reshape(L * 2 * P, K, S, H))
    tile = plgpu.SMEM((padded, H), dtype)
    q = plgpu.kernel(
        norm_rope_write_kernel,
        out_type=jax.ShapeDtypeStruct((T, K, G, H), dtype),
        scratch_types=[tile, tile, plgpu.Barrier()],
        grid=(T,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(jnp.full((1,), layer, jnp.int32), qkv.reshape(T, num_rows, H), cos, sin, slots, *weights, kv_ref)
    return q, jax.freeze(kv_ref).reshape(kv.shape)

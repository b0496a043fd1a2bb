"""The operation on Hopper: one block a token, whose queries and keys stay in registers between norm and rotation."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.elementwise import from_bits, norm_and_rotate, sum_parts, to_bits
from qjax.kernels.norm_rope_write.reference import as_queries, in_cache, query_dtype, saturate

HALF = 64
# [heads, rows of a head, 64]: a warp holds whole rows, so that the pairs that are rotated lie in one thread and a row
# is summed by one warp.
ROWS = plgpu.Layout.TILED(Tiling(((4, 1, HALF), (2,))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
COLUMNS = ROWS.reduce((0, 1))
HEADS = ROWS.reduce((1, 2))


def norm_rope_write_mosaic(
    kv, parts, norms, cos, sin, slots, scales, *, dtype, eps: float, layer: jax.Array | int, interpret: bool
):
    K, H = kv.shape[3], kv.shape[5]
    if 2 * HALF == H and K % 4 == 0 and dtype in (jnp.bfloat16, jnp.float16) and kv.dtype in (dtype, jnp.uint8):
        args = (kv, parts, norms, cos, sin, slots, scales)
        return _norm_rope_write(*args, dtype=dtype, eps=eps, layer=layer, interpret=interpret)
    q, k, v = norm_and_rotate(sum_parts(parts, dtype), norms, eps, cos, sin)
    rows = in_cache(jnp.stack([k, v], axis=1), kv.dtype, scales)
    q = as_queries(q, query_dtype(kv.dtype, dtype))
    return q, to_bits(_write(from_bits(kv), rows[:, 0], rows[:, 1], slots, layer=layer, interpret=interpret))


@functools.partial(jax.jit, static_argnames=("dtype", "eps", "interpret"))  # one trace and one kernel for all layers
def _norm_rope_write(
    kv, parts, norms, cos, sin, slots, scales, *, dtype, eps: float, layer: jax.Array | int, interpret: bool
):
    P, K, S, H = kv.shape[2:]
    num_parts, T, G, is_narrow = parts.shape[0], parts.shape[1], parts.shape[3] - 2, kv.dtype == jnp.uint8
    q_dtype = query_dtype(kv.dtype, dtype)
    weights = [] if norms is None else [w.reshape(2, HALF) for w in norms]
    scale_args = [] if scales is None else [scales]

    def norm_rope_write_kernel(layer_ref, parts_ref, cos_ref, sin_ref, slots_ref, *refs):
        weight_refs, refs = refs[: len(weights)], refs[len(weights) :]
        scales_ref, (kv_ref, q_ref, *smem) = refs[0] if scale_args else None, refs[len(scale_args) :]
        q_smem, k_smem, v_smem = smem[:2], smem[2:4], smem[4:]
        token = lax.axis_index("token")
        slot = slots_ref[token]
        # Straight into registers, half a row at a time: a slice of columns of a buffer in shared memory is read with
        # the wrong swizzle (jax 0.11.2). "optimized" is about shared memory, too.
        load = functools.partial(plgpu.load, optimized=False)
        cos, sin = (load(ref.at[token], layout=COLUMNS) for ref in (cos_ref, sin_ref))

        def rows_of_heads(first: int, count: int) -> list[jax.Array]:
            """Both halves of each head's rows, as the projection gives them in the model's dtype."""
            piece = lambda part, half: load(parts_ref.at[part, token, :, pl.ds(first, count), half], layout=ROWS)
            return [sum((piece(part, half) for part in range(1, num_parts)), piece(0, half)) for half in (0, 1)]

        def store_queries(target, rows) -> None:
            target[...] = as_queries(rows.astype(dtype), q_dtype)

        def store_keys_or_values(plane: int, target, rows) -> None:
            rows = rows.astype(dtype)
            if is_narrow:
                rows = rows.astype(jnp.float32)
                if scales_ref is not None:
                    rows = rows / lax.broadcast_in_dim(load(scales_ref.at[plane], layout=HEADS), rows.shape, [0])
                rows = saturate(rows)
            target[...] = rows

        def norm_and_rotate_rows(first: int, count: int, weight_ref, store, targets) -> None:
            low, high = (half.astype(dtype).astype(jnp.float32) for half in rows_of_heads(first, count))
            across = lambda columns: lax.broadcast_in_dim(columns, low.shape, [2])
            if weight_ref is not None:
                mean = (jnp.sum(low * low, axis=2) + jnp.sum(high * high, axis=2)) / H
                scale = lax.broadcast_in_dim(lax.rsqrt(mean + eps), low.shape, [0, 1])
                w_low, w_high = (across(load(weight_ref.at[half], layout=COLUMNS)) for half in (0, 1))
                low = ((low * scale).astype(dtype) * w_low).astype(jnp.float32)
                high = ((high * scale).astype(dtype) * w_high).astype(jnp.float32)
            store(targets[0], low * across(cos) - high * across(sin))
            store(targets[1], high * across(cos) + low * across(sin))

        q_weight, k_weight = weight_refs or (None, None)
        norm_and_rotate_rows(0, G, q_weight, store_queries, q_smem)
        norm_and_rotate_rows(G, 1, k_weight, functools.partial(store_keys_or_values, 0), k_smem)
        for target, half in zip(v_smem, rows_of_heads(G + 1, 1), strict=True):
            store_keys_or_values(1, target, half)
        plgpu.commit_smem()
        for half in (0, 1):
            plgpu.copy_smem_to_gmem(q_smem[half], q_ref.at[token, :, :, half])

        @pl.when(slot >= 0)
        def _():
            page, offset = lax.div(slot, jnp.int32(S)), lax.rem(slot, jnp.int32(S))
            k_page = 2 * layer_ref[0] * P + page
            for half in (0, 1):
                plgpu.copy_smem_to_gmem(k_smem[half], kv_ref.at[k_page, :, pl.ds(offset, 1), half])
                plgpu.copy_smem_to_gmem(v_smem[half], kv_ref.at[k_page + P, :, pl.ds(offset, 1), half])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kv_ref = jax.new_ref(from_bits(kv).reshape(-1, K, S, 2, HALF))
    half_q, half_k = plgpu.SMEM((K, G, HALF), q_dtype), plgpu.SMEM((K, 1, HALF), kv_ref.dtype)
    q = plgpu.kernel(
        norm_rope_write_kernel,
        out_type=jax.ShapeDtypeStruct((T, K, G, 2, HALF), q_dtype),
        scratch_types=[half_q, half_q, *[half_k] * 4],
        grid=(T,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(_one(layer), parts.reshape(*parts.shape[:4], 2, HALF), cos, sin, slots, *weights, *scale_args, kv_ref)
    return q.reshape(T, K, G, H), to_bits(jax.freeze(kv_ref)).reshape(kv.shape)


@functools.partial(jax.jit, static_argnames=("interpret",))
def _write(
    kv: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, layer: jax.Array | int, interpret: bool
) -> jax.Array:
    """The cache with rows of keys and values [T, K, H] that XLA has normed and rotated."""
    P, K, S, H = kv.shape[2:]
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
    kv_ref = jax.new_ref(kv.reshape(-1, K, S, H))
    row = plgpu.SMEM((K, H), kv.dtype)
    plgpu.kernel(
        kv_write_kernel,
        out_type=(),
        scratch_types=[row, row, plgpu.Barrier(num_arrivals=2)],
        grid=slots.shape,
        grid_names=("token",),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(_one(layer), k.astype(kv.dtype), v.astype(kv.dtype), slots, kv_ref)
    return jax.freeze(kv_ref).reshape(kv.shape)


def _one(layer) -> jax.Array:
    return jnp.full((1,), layer, jnp.int32)

"""Paged decode on Hopper: the keys and values of a long sequence are cut into splits, which a second kernel joins.

A persistent grid takes (split, KV head) items from a list that is as long as the contexts are, whatever the width of
the page table. In each block one warpgroup fetches pages with TMA and one computes. A sequence's splits depend on
its own length alone, so a row's result does not depend on the batch it is in, bit for bit.

Tiles of an e4m3 cache are fetched as they are and widened by who computes, keys in registers and values on their way to
another buffer; what is left of the work is the same.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.paged_attention.mosaic_common import (
    COLUMNS,
    LOG2E,
    MASKED,
    MATRIX,
    NUM_SMS,
    TILED,
    add_transposed_product,
    broadcast_columns,
    check_supported,
    flat_pages,
    load_tile,
    load_widened,
    num_copies,
    page_slices,
    scores_product,
    store_transposed,
    tiled,
    zero_rows_from,
)

TILE = 64  # tokens fetched and computed at once, the rows of a wgmma
NUM_STAGES = 6  # tiles in flight: 192 KiB of H = 128, several times bandwidth * latency of one SM
# Of an e4m3 cache: two blocks share an SM (at most 128 registers), so that one widens while the other multiplies.
NARROW_BLOCKS, NARROW_STAGES = 2, 4
MAX_SPLITS = 64
JOIN_UNROLL = 4  # splits whose loads the joining kernel has in flight together


@functools.partial(
    jax.jit, static_argnames=("scale", "out_dtype", "interpret")
)  # one trace and one kernel for all layers
def paged_decode_mosaic(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    context_lens: jax.Array,
    scales: jax.Array | None,
    *,
    layer: jax.Array | int,
    scale: float,
    out_dtype,
    interpret: bool,
) -> jax.Array:
    check_supported(q, kv, max_group=16)
    B, N, H = q.shape
    K, S = kv.shape[3:5]
    G = N // K
    first_item, num_splits, items = split_items(context_lens, page_table.shape[1] * S, K)
    # Queries arrive in boxes of whole 8-row tiles: that of a group, its neighbours with it, or a padded group.
    stride = G if 8 % G == 0 and N % 8 == 0 else G + -G % 8
    q = jnp.pad(q.reshape(B, K, G, H), ((0, 0), (0, 0), (0, stride - G), (0, 0)))
    options = {"layer": layer, "scale": scale, "out_dtype": out_dtype, "interpret": interpret}
    final, partial, lse = _splits(q, kv, page_table, items, scales, G=G, num_rows=_rows_kept(G, H), **options)
    out = _join(final, partial, lse, first_item, num_splits, stride=stride, interpret=interpret)
    return out.reshape(B, N, H)


def tiles_per_split(num_tiles, num_kv_heads: int):
    """Long splits for long contexts: enough of them to fill the GPU at batch 1, few enough to be cheap to join."""
    by_length = jnp.where(num_tiles <= 32, 4, jnp.where(num_tiles <= 128, 8, jnp.where(num_tiles <= 512, 16, 32)))
    by_length = jnp.maximum(by_length * min(num_kv_heads, 8) // 8, 4)
    return jnp.maximum(by_length, -(-num_tiles // MAX_SPLITS))


def split_items(context_lens: jax.Array, max_context: int, num_kv_heads: int) -> tuple[jax.Array, ...]:
    """Cuts each sequence into splits of about equal numbers of tiles.

    Returns int32 first_item [B], num_splits [B] and items [I, 4]: sequence, first tile, number of tiles (0 in the
    unused tail of the list), context length. Every layer asks for the same; XLA computes it once a step.
    """
    B = context_lens.shape[0]
    num_tiles = -(-context_lens // TILE)
    num_splits = -(-num_tiles // tiles_per_split(num_tiles, num_kv_heads))
    end = jnp.cumsum(num_splits)
    with jax.ensure_compile_time_eval():
        lengths = jnp.arange(-(-max_context // TILE) + 1)
        most = int(jnp.max(-(-lengths // tiles_per_split(lengths, num_kv_heads))))
    item = jnp.arange(B * most, dtype=jnp.int32)
    seq = jnp.sum(end[None, :] <= item[:, None], axis=1, dtype=jnp.int32)
    is_item = seq < B
    seq = jnp.minimum(seq, B - 1)
    split = item - (end - num_splits)[seq]
    splits, tiles = jnp.maximum(num_splits[seq], 1), num_tiles[seq]
    first, last = split * tiles // splits, (split + 1) * tiles // splits
    items = jnp.stack([seq, first, jnp.where(is_item, last - first, 0), context_lens[seq]], axis=1)
    return (end - num_splits).astype(jnp.int32), num_splits.astype(jnp.int32), items.astype(jnp.int32)


def _rows_kept(G: int, H: int) -> int:
    """Rows of a partial result: the group's, and one more where a warpgroup could not share them out evenly."""
    return G + (G * H // 64) % 2


def _splits(q, kv, page_table, items, scales, *, G, num_rows, layer, scale, out_dtype, interpret) -> list[jax.Array]:
    """Attention within each split: the results [B, K, G, H] of sequences with one split, normalised outputs
    [I, K, num_rows, H] and log2-sum-exp2 [I, K, box] of the others' splits. The rest of the three is not written.

    Tokens are the rows of both products and queries the columns, because a wgmma has 64 rows at least and 8 columns.
    A group's columns begin at `head * stride % 8` of its box.
    """
    B, K, stride, H = q.shape
    q = q.reshape(B * K * stride, H)
    box = max(stride, 8)
    P, S = kv.shape[2], kv.shape[4]
    num_items = items.shape[0]
    dtype, is_narrow = q.dtype, kv.dtype == jnp.uint8
    num_stages = NARROW_STAGES if is_narrow else NUM_STAGES
    num_blocks = min(NUM_SMS * (NARROW_BLOCKS if is_narrow else 1), num_items * K)
    scale_args = [] if scales is None else [scales]

    def paged_decode_splits_kernel(layer_ref, q_ref, pages_ref, table_ref, items_ref, *refs):
        scales_ref = refs[0] if scale_args else None
        (final_ref, out_ref, lse_ref,
         q_smem, k_smem, v_smem, p_smem, final_smem, out_smem, lse_smem,
         q_full, q_empty, k_full, v_full, kv_empty, *wide) = refs[len(scale_args):]  # fmt: skip
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

        def for_each_item(handle):
            """Calls `handle(turn, tiles so far, item, head, seq, first tile, number of tiles, length)`."""

            def is_left(state):
                index, _, _ = state
                item = lax.div(index, jnp.int32(K))
                return (item < num_items) & (items_ref[jnp.minimum(item, num_items - 1), 2] > 0)

            def step(state):
                index, turn, done = state
                item, head = lax.div(index, jnp.int32(K)), lax.rem(index, jnp.int32(K))
                seq, first, count, length = (items_ref[item, j] for j in range(4))
                handle(turn, done, item, head, seq, first, count, length)
                return index + num_blocks, turn + 1, done + count

            lax.while_loop(is_left, step, (block.astype(jnp.int32), jnp.int32(0), jnp.int32(0)))

        @pl.when(warpgroup == 0)
        def _compute():
            # Everything starts out free, so that the producer can wait in the same way every time.
            for slot in range(num_stages):
                plgpu.barrier_arrive(kv_empty.at[slot])
            for slot in range(2):
                plgpu.barrier_arrive(q_empty.at[slot])

            def handle(turn, done, item, head, seq, first, count, length):
                q_slot = lax.rem(turn, jnp.int32(2))
                column = lax.rem(head * stride, jnp.int32(8))
                to_log2 = scale * LOG2E if scales_ref is None else scale * LOG2E * scales_ref[0, head]
                plgpu.barrier_wait(q_full.at[q_slot])

                def step(i, state):
                    acc, max_, sums = state
                    slot = lax.rem(done + i, jnp.int32(num_stages))
                    num_valid = length - (first + i) * TILE
                    plgpu.barrier_wait(k_full.at[slot])
                    k_tile, v_tile = k_smem.at[slot], v_smem.at[slot]
                    if is_narrow:
                        k_tile, v_tile = load_widened(k_tile, dtype, MATRIX), wide[0]
                    scores = scores_product(k_tile, q_smem.at[q_slot], interpret)
                    token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=MATRIX)
                    scores = jnp.where(token < num_valid, scores * to_log2, MASKED)
                    new_max = jnp.maximum(max_, scores.max(axis=0))
                    decay = jnp.exp2(max_ - new_max)
                    p = jnp.exp2(scores - broadcast_columns(new_max, scores.shape))
                    store_transposed(p_smem, p.astype(dtype), interpret)
                    if is_narrow:
                        plgpu.barrier_wait(v_full.at[slot])
                        v_tile[...] = load_widened(v_smem.at[slot], dtype, MATRIX)
                    plgpu.commit_smem()
                    acc = acc * broadcast_columns(decay, acc.shape)
                    sums = sums * broadcast_columns(decay, sums.shape) + p
                    if is_narrow:
                        plgpu.barrier_arrive(kv_empty.at[slot])
                    else:
                        plgpu.barrier_wait(v_full.at[slot])
                    pl.when(num_valid < TILE)(lambda: zero_rows_from(v_tile, num_valid))
                    acc = add_transposed_product(acc, v_tile, p_smem, interpret)
                    if not is_narrow:
                        plgpu.barrier_arrive(kv_empty.at[slot])
                    return acc, new_max, sums

                zeros = lambda rows: plgpu.layout_cast(jnp.full((rows, box), 0, jnp.float32), MATRIX)
                lowest = plgpu.layout_cast(jnp.full((box,), MASKED, jnp.float32), COLUMNS)
                acc, max_, sums = lax.fori_loop(0, count, step, (zeros(H), lowest, zeros(TILE)))
                plgpu.barrier_arrive(q_empty.at[q_slot])
                sum_ = sums.sum(axis=0)
                out = acc / broadcast_columns(sum_, acc.shape)
                if scales_ref is not None:
                    out = out * scales_ref[1, head]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before has left the buffers
                is_only_split = count * TILE >= length

                @pl.when(is_only_split)
                def _():
                    store_transposed(final_smem, out.astype(out_dtype), interpret)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(final_smem.at[pl.ds(column, G)], final_ref.at[seq, head])

                @pl.when(jnp.logical_not(is_only_split))
                def _():
                    store_transposed(out_smem.at[pl.ds(0, box)], out, interpret)
                    lse_smem[...] = max_ + jnp.log2(sum_)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(column, num_rows)], out_ref.at[item, head])
                    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[item, head])

            for_each_item(handle)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _fetch():
            def handle(turn, done, item, head, seq, first, count, length):
                del item
                q_slot = lax.rem(turn, jnp.int32(2))
                plgpu.barrier_wait(q_empty.at[q_slot])
                first_row = pl.multiple_of(lax.div((seq * K + head) * stride, jnp.int32(8)) * 8, 8)
                plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(first_row, box)], q_smem.at[q_slot], q_full.at[q_slot])

                def step(i, _):
                    slot = lax.rem(done + i, jnp.int32(num_stages))
                    slices = page_slices(table_ref, seq, first + i, TILE, S)
                    plgpu.barrier_wait(kv_empty.at[slot])
                    where = {"num_pages": P, "head": head, "num_heads": K, "num_valid": length - (first + i) * TILE}
                    load_tile(pages_ref, k_smem.at[slot], k_full.at[slot], slices, plane=2 * layer_ref[0], **where)
                    load_tile(pages_ref, v_smem.at[slot], v_full.at[slot], slices, plane=2 * layer_ref[0] + 1, **where)

                lax.fori_loop(0, count, step, None)

            for_each_item(handle)
            # The last arrivals: no block ends before its barriers are all waited for.
            for slot in range(num_stages):
                plgpu.barrier_wait(kv_empty.at[slot])
            for slot in range(2):
                plgpu.barrier_wait(q_empty.at[slot])

    pages = flat_pages(kv)
    tiles = plgpu.SMEM((num_stages, TILE, H), pages.dtype, transforms=tiled(H, pages.dtype))
    filled = plgpu.Barrier(num_arrivals=num_copies(TILE, S), num_barriers=num_stages)
    return plgpu.kernel(
        paged_decode_splits_kernel,
        out_type=[
            jax.ShapeDtypeStruct((B, K, G, H), out_dtype),
            jax.ShapeDtypeStruct((num_items, K, num_rows, H), jnp.float32),
            jax.ShapeDtypeStruct((num_items, K, box), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((2, box, H), dtype, transforms=TILED),
            tiles,
            tiles,
            plgpu.SMEM((box, TILE), dtype, transforms=TILED),
            plgpu.SMEM((box, H), out_dtype),
            plgpu.SMEM((box + num_rows - G, H), jnp.float32),
            plgpu.SMEM((box,), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            filled,
            filled,
            plgpu.Barrier(num_barriers=num_stages),
            *([plgpu.SMEM((TILE, H), dtype, transforms=TILED)] if is_narrow else []),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(jnp.full((1,), layer, jnp.int32), q, pages, page_table, items, *scale_args)


def _join(final, partial, lse, first_item, num_splits, *, stride, interpret) -> jax.Array:
    """`final` [B, K, G, H] with the joined splits of each sequence that has several; one without any gets 0."""
    num_items, K, num_rows, H = partial.shape
    B, _, G, _ = final.shape
    size = num_rows * H
    vector = plgpu.Layout.WG_STRIDED((size,), vec_size=max(n for n in (1, 2, 4) if size % (128 * n) == 0))

    def paged_decode_join_kernel(partial_ref, lse_ref, first_ref, count_ref, out_ref, out_smem):
        seq, head = lax.axis_index("seq"), lax.axis_index("head")
        first, count, row = first_ref[seq], count_ref[seq], lax.rem(head * stride, jnp.int32(8))

        @pl.when(count != 1)
        def _():
            out_smem[...] = _joined(partial_ref, lse_ref, vector, head, first, count, row, G, H).astype(final.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, G * H)], out_ref.at[seq, head])
            plgpu.wait_smem_to_gmem(0)

    out_ref = jax.new_ref(final.reshape(B, K, G * H))
    plgpu.kernel(
        paged_decode_join_kernel,
        out_type=(),
        scratch_types=[plgpu.SMEM((size,), final.dtype)],
        grid=(B, K),
        grid_names=("seq", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(partial.reshape(num_items, K, size), lse, first_item, num_splits, out_ref)
    return jax.freeze(out_ref)


def _joined(partial_ref, lse_ref, vector, head, first, count, row, G: int, H: int) -> jax.Array:
    """float32 [num_rows * H] in the layout `vector`."""
    size = partial_ref.shape[-1]
    position = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=vector)

    def spread(values: list[jax.Array]) -> jax.Array:
        """One scalar a query head -> a vector over its H elements."""
        out = lax.broadcast_in_dim(values[-1], (size,), [])
        for g in reversed(range(G - 1)):
            out = jnp.where(position < (g + 1) * H, values[g], out)
        return out

    def step(i, state):
        acc, max_, sum_ = state
        items, scores = [], []
        for u in range(JOIN_UNROLL):
            split = i * JOIN_UNROLL + u
            item = first + jnp.minimum(split, count - 1)
            items.append(item)
            scores.append([jnp.where(split < count, lse_ref[item, head, row + g], MASKED) for g in range(G)])
        outs = [plgpu.load(partial_ref.at[item, head], layout=vector) for item in items]
        new_max = [jnp.maximum(max_[g], _max([s[g] for s in scores])) for g in range(G)]
        decay = [jnp.exp2(max_[g] - new_max[g]) for g in range(G)]
        weights = [[jnp.exp2(s[g] - new_max[g]) for g in range(G)] for s in scores]
        acc = acc * spread(decay)
        for out, weight in zip(outs, weights, strict=True):
            acc = acc + out * spread(weight)
        sum_ = tuple(sum_[g] * decay[g] + sum(w[g] for w in weights) for g in range(G))
        return acc, tuple(new_max), sum_

    zero = plgpu.layout_cast(jnp.full((size,), 0, jnp.float32), vector)
    state = zero, (jnp.float32(MASKED),) * G, (jnp.float32(0),) * G
    acc, _, sum_ = lax.fori_loop(0, lax.div(count + JOIN_UNROLL - 1, jnp.int32(JOIN_UNROLL)), step, state)
    return acc / spread([jnp.maximum(s, 1e-30) for s in sum_])


def _max(values: list[jax.Array]) -> jax.Array:
    out = values[0]
    for value in values[1:]:
        out = jnp.maximum(out, value)
    return out

"""Ragged chunked prefill on Hopper: FlashAttention-3's shape over a paged cache.

A block computes 128 query rows of one head: two warpgroups of 64 rows take turns on the tensor cores, a third
fetches pages with TMA, and widens those of an e4m3 cache on their way. Blocks lie at multiples of 128 rows of the step,
where TMA can read and write whole tiles; a block that several chunks share is visited once for each, and such a visit
writes its own rows one by one. The other ways out cost every row for the sake of a few: chunks aligned by the scheduler
waste rows of the whole model, and a padded output would be written, read and written again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.paged_attention.mosaic_common import (
    LOG2E,
    MASKED,
    MATRIX,
    STRIP,
    STRIP_ROWS,
    TILED,
    add_values_product,
    broadcast_rows,
    check_supported,
    flat_pages,
    initial_state,
    load_tile,
    load_widened,
    num_copies,
    page_slices,
    scores_product,
    tiled,
    zero_rows_from,
)

BLOCK = 128  # query rows of a thread block
ROWS = 64  # query rows of a warpgroup
TILE = 128  # tokens of keys and values fetched and computed at once
NUM_STAGES = 2


@functools.partial(
    jax.jit, static_argnames=("scale", "out_dtype", "interpret")
)  # one trace and one kernel for all layers
def paged_prefill_mosaic(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    context_lens: jax.Array,
    query_starts: jax.Array,
    scales: jax.Array | None,
    *,
    layer: jax.Array | int,
    scale: float,
    out_dtype,
    interpret: bool,
) -> jax.Array:
    check_supported(q, kv, max_group=q.shape[1])
    T = q.shape[0]
    q = jnp.pad(q, ((0, -T % BLOCK), (0, 0), (0, 0)))
    items = block_items(context_lens, query_starts, q.shape[0] // BLOCK)
    options = {"layer": layer, "scale": scale, "out_dtype": out_dtype, "interpret": interpret}
    return _blocks(q, kv, page_table, items, scales, **options)[:T]


def block_items(context_lens: jax.Array, query_starts: jax.Array, num_blocks: int) -> jax.Array:
    """The (chunk, block of rows) pairs with rows in common, most work first so that the GPU's last wave is short.

    Returns int32 [num_blocks + B + 1, 7]: chunk, block, its first and its last row + 1 within the block, position of
    the block's row 0 in the sequence, number of tiles of keys to visit, context length. The rows after the last chunk
    form one more chunk that sees no keys, which makes their output 0. In an unused item the last row + 1 is 0.
    """
    B = context_lens.shape[0]
    starts, ends = query_starts, jnp.append(query_starts[1:], num_blocks * BLOCK)  # [B + 1]
    first_block = starts // BLOCK
    blocks = jnp.where(ends > starts, -(-ends // BLOCK) - first_block, 0)
    last_item = jnp.cumsum(blocks)
    item = jnp.arange(num_blocks + B + 1, dtype=jnp.int32)
    chunk = jnp.sum(last_item[None, :] <= item[:, None], axis=1, dtype=jnp.int32)
    is_item, chunk = chunk <= B, jnp.minimum(chunk, B)
    block = item - (last_item - blocks)[chunk] + first_block[chunk]
    first_row = jnp.maximum(starts[chunk] - block * BLOCK, 0)
    end_row = jnp.where(is_item, jnp.minimum(ends[chunk] - block * BLOCK, BLOCK), 0)
    is_chunk = is_item & (chunk < B)
    context = jnp.where(is_chunk, context_lens[jnp.minimum(chunk, B - 1)], 0)
    position = jnp.where(is_chunk, context - ends[chunk] + block * BLOCK, 0)
    tiles = jnp.where(is_chunk, -(-(position + end_row) // TILE), 0)
    columns = jnp.stack([chunk, block, first_row, end_row, position, tiles, context], axis=1).astype(jnp.int32)
    # Ranks by counting: there are few items, and a sort is many kernels.
    weight = jnp.where(is_item, tiles, -1)
    before = (weight[None, :] > weight[:, None]) | (
        (weight[None, :] == weight[:, None]) & (item[None, :] < item[:, None])
    )
    rank = jnp.sum(before, axis=1)
    order = jnp.sum(jnp.where(rank[None, :] == item[:, None], item[None, :], 0), axis=1)
    return columns[order]


def _blocks(q, kv, page_table, items, scales, *, layer, scale, out_dtype, interpret) -> jax.Array:
    T, N, H = q.shape
    P, K, S = kv.shape[2:5]
    B = page_table.shape[0]
    dtype, is_narrow = q.dtype, kv.dtype == jnp.uint8
    scale_args = [] if scales is None else [scales]

    def paged_prefill_kernel(layer_ref, q_ref, pages_ref, table_ref, items_ref, *refs):
        scales_ref = refs[0] if scale_args else None
        (out_ref,
         q_smem, k_smem, v_smem, rows_smem,
         q_full, k_full, v_full, k_empty, v_empty, turn, is_zeroed, *narrow) = refs[len(scale_args):]  # fmt: skip
        item, head, warpgroup = (lax.axis_index(name) for name in ("item", "head", "warpgroup"))
        field = lambda j: items_ref[item, j]  # read again where needed: a register kept through the loop may spill
        is_used, num_tiles = field(3) > 0, field(5)

        def take_turns():
            """While one warpgroup multiplies, the other computes its softmax."""
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def slot_of(i):
            return lax.rem(i, jnp.int32(NUM_STAGES))

        @pl.when((warpgroup < 2) & is_used)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            for slot in range(NUM_STAGES):
                plgpu.barrier_arrive(k_empty.at[slot])
                plgpu.barrier_arrive(v_empty.at[slot])
            row0 = warpgroup * ROWS
            q_tile = q_smem.at[warpgroup]
            kv_head = lax.div(head, jnp.int32(N // K))
            to_log2 = scale * LOG2E if scales_ref is None else scale * LOG2E * scales_ref[0, kv_head]
            rows_of_step = lambda: pl.ds(pl.multiple_of(field(1) * BLOCK + row0, ROWS), ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[rows_of_step(), head], q_tile, q_full.at[warpgroup])
            plgpu.barrier_wait(q_full.at[warpgroup])
            pl.when(num_tiles > 0)(lambda: plgpu.barrier_wait(k_full.at[0]))
            pl.when(warpgroup == 1)(take_turns)

            def step(i, state, is_masked: bool):
                acc, max_, sum_ = state
                slot = slot_of(i)
                scores = scores_product(q_tile, k_smem.at[slot], interpret, meanwhile=take_turns)
                plgpu.barrier_arrive(k_empty.at[slot])
                if is_masked:
                    row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=MATRIX)
                    token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
                    scores = jnp.where(token - row <= position - i * TILE, scores, MASKED)
                new_max = jnp.maximum(max_, scores.max(axis=1) * to_log2)
                decay = jnp.exp2(max_ - new_max)
                p = jnp.exp2(scores * to_log2 - broadcast_rows(new_max, scores.shape))
                acc = acc * broadcast_rows(decay, acc.shape)
                sum_ = sum_ * decay
                p_narrow = p.astype(dtype)
                sum_ = sum_ + p.sum(axis=1)
                acc, sum_, new_max, p_narrow = lax.optimization_barrier((acc, sum_, new_max, p_narrow))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                if is_masked:
                    num_valid = field(6) - i * TILE

                    @pl.when(num_valid < TILE)
                    def _():  # each warpgroup half of the tile
                        v_half = v_smem.at[slot, pl.ds(pl.multiple_of(row0, ROWS), TILE // 2)]
                        zero_rows_from(v_half, num_valid - row0)
                        plgpu.barrier_arrive(is_zeroed)
                        plgpu.barrier_wait(is_zeroed)

                plgpu.barrier_wait(turn)

                def wait_for_next_keys():
                    pl.when(i + 1 < num_tiles)(lambda: plgpu.barrier_wait(k_full.at[slot_of(i + 1)]))

                acc = add_values_product(acc, p_narrow, v_smem.at[slot], interpret, meanwhile=wait_for_next_keys)
                plgpu.barrier_arrive(v_empty.at[slot])
                return acc, new_max, sum_

            position = field(4) + row0  # of this warpgroup's first row
            # No tile past the context counts as unmasked, also for a warpgroup whose rows all lie past the chunk's end:
            # both have to come to the zeroing of the last tile.
            num_unmasked = jnp.clip(lax.div(jnp.minimum(position + 1, field(6)), jnp.int32(TILE)), 0, num_tiles)
            state = initial_state(ROWS, H)
            state = lax.fori_loop(0, num_unmasked, lambda i, s: step(i, s, False), state)
            acc, _, sum_ = lax.fori_loop(num_unmasked, num_tiles, lambda i, s: step(i, s, True), state)
            pl.when(warpgroup == 0)(take_turns)

            out = acc / broadcast_rows(jnp.maximum(sum_, 1e-30), acc.shape)
            if scales_ref is not None:
                out = out * scales_ref[1, kv_head]
            out = lax.bitcast_convert_type(out.astype(out_dtype), dtype)  # it leaves through the queries' buffer
            first, end = (jnp.clip(field(j) - row0, 0, ROWS) for j in (2, 3))

            @pl.when((first == 0) & (end == ROWS))
            def _():
                q_tile[...] = out
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_tile, out_ref.at[rows_of_step(), head])

            @pl.when((first > 0) | (end < ROWS))
            def _():
                rows_smem[warpgroup] = out
                plgpu.commit_smem()

                def write_row(r, _):
                    row = field(1) * BLOCK + row0 + r
                    plgpu.copy_smem_to_gmem(rows_smem.at[warpgroup, pl.ds(r, 1)], out_ref.at[pl.ds(row, 1), head])

                lax.fori_loop(first, end, write_row, None)

            plgpu.wait_smem_to_gmem(0)

        @pl.when((warpgroup == 2) & is_used)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")
            where = {"num_pages": P, "head": lax.div(head, jnp.int32(N // K)), "num_heads": K}

            def step(i, _):
                slot = slot_of(i)
                slices = page_slices(table_ref, jnp.minimum(field(0), B - 1), i, TILE, S)
                plgpu.barrier_wait(k_empty.at[slot])
                load_tile(pages_ref, k_smem.at[slot], k_full.at[slot], slices, plane=2 * layer_ref[0], **where)
                plgpu.barrier_wait(v_empty.at[slot])
                load_tile(pages_ref, v_smem.at[slot], v_full.at[slot], slices, plane=2 * layer_ref[0] + 1, **where)

            def fetch_narrow(i, plane: int):
                slices = page_slices(table_ref, jnp.minimum(field(0), B - 1), i, TILE, S)
                tile, came = narrow[plane], narrow[2 + plane]
                load_tile(pages_ref, tile, came, slices, plane=2 * layer_ref[0] + plane, **where)

            def widen(i, plane: int, wide, full, empty):
                slot, tile, came = slot_of(i), narrow[plane], narrow[2 + plane]
                plgpu.barrier_wait(came)
                plgpu.barrier_wait(empty.at[slot])
                for row in range(0, TILE, STRIP_ROWS):
                    rows = pl.ds(row, STRIP_ROWS)
                    wide[slot, rows] = load_widened(tile.at[rows], dtype, STRIP)
                plgpu.commit_smem()
                plgpu.barrier_arrive(full.at[slot])
                pl.when(i + 1 < num_tiles)(lambda: fetch_narrow(i + 1, plane))

            def widening_step(i, _):
                widen(i, 0, k_smem, k_full, k_empty)
                widen(i, 1, v_smem, v_full, v_empty)

            if is_narrow:
                for plane in (0, 1):
                    pl.when(num_tiles > 0)(functools.partial(fetch_narrow, 0, plane))
            lax.fori_loop(0, num_tiles, widening_step if is_narrow else step, None)
            for slot in range(NUM_STAGES):  # no block ends before its barriers are all waited for
                plgpu.barrier_wait(k_empty.at[slot])
                plgpu.barrier_wait(v_empty.at[slot])

    tiles = plgpu.SMEM((NUM_STAGES, TILE, H), dtype, transforms=TILED)
    copies = num_copies(TILE, S)
    filled = plgpu.Barrier(num_arrivals=1 if is_narrow else copies, num_barriers=NUM_STAGES)
    pages = flat_pages(kv)
    narrow_tile = plgpu.SMEM((TILE, H), pages.dtype, transforms=tiled(H, pages.dtype))
    came = plgpu.Barrier(num_arrivals=copies)
    for_narrow: list[Any] = [narrow_tile, narrow_tile, came, came] if is_narrow else []
    emptied = plgpu.Barrier(num_arrivals=2, num_barriers=NUM_STAGES)
    out = plgpu.kernel(
        paged_prefill_kernel,
        out_type=jax.ShapeDtypeStruct((T, N, H), dtype),
        scratch_types=[
            plgpu.SMEM((2, ROWS, H), dtype, transforms=TILED),
            tiles,
            tiles,
            plgpu.SMEM((2, ROWS, H), dtype),  # as rows in order, which the tiled buffer cannot be copied by
            plgpu.Barrier(num_barriers=2),
            filled,
            filled,
            emptied,
            emptied,
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            *for_narrow,
        ],
        grid=(items.shape[0], N),  # the last axis runs fastest: heads that share keys run together
        grid_names=("item", "head"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(jnp.full((1,), layer, jnp.int32), q, pages, page_table, items, *scale_args)
    return lax.bitcast_convert_type(out, out_dtype)

"""The product on Hopper: a persistent grid of (column tile, part of the sum, row tile) units.

One warpgroup fetches cells of the weight, their scales and tiles of x with TMA. Each of the others has 64 outputs: it
makes q - zero of a cell in registers, in the layout of wgmma's left operand, multiplies them by x transposed into fresh
accumulators, and adds those to its own times the group's scale. So the weight needs no more than a shift, a mask and a
subtraction for two numbers, and only x is read by wgmma from shared memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.int4_matmul.packing import CELL_OUTPUTS, CELL_WORDS, GROUP, ZERO_MASK
from qjax.kernels.int4_matmul.reference import unpack_weights
from qjax.kernels.int4_matmul.registers import OUTPUTS, WORDS, centred_weights, store_transposed

NUM_SMS = 132  # of an H100 or H200; only a guide for how to cut the work
MAX_ROWS = 256  # more are multiplied faster by weights that are dequantised once
SMEM_BYTES = 227 * 1024 - 2048  # a block's most, less the barriers
ROW_TILE = 128  # rows of x at most that a unit has: its sums stay in registers
CHUNK = 64  # of them multiplied at once, for the registers' sake
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


class Plan(NamedTuple):
    """How a product is cut."""

    rows: int  # of a row tile, a multiple of 8
    num_warpgroups: int  # that multiply, each 64 outputs of a column tile
    num_parts: int  # of the sum over D
    num_stages: int
    unroll: int  # groups whose products are in flight together


@functools.cache
def plan(M: int, D: int, N: int, out_bytes: int) -> Plan:
    """The cut with the least estimated time.

    Raises:
      NotImplementedError: there is none.
    """
    if M > MAX_ROWS or D % GROUP:
        raise NotImplementedError(f"a product of {M} rows over {D} columns")
    row_tiles, groups = -(-M // ROW_TILE), D // GROUP
    rows = -(-M // (8 * row_tiles)) * 8
    best: tuple[float, Plan | None] = (math.inf, None)
    for num_warpgroups in (2, 3, 1):
        tile_n = num_warpgroups * CELL_OUTPUTS
        does_spill = num_warpgroups == 3 and row_tiles > 1 and rows > 112  # of 128 registers
        if N % tile_n or does_spill:
            continue
        unroll = 2 if groups % 2 == 0 and rows <= (64 if num_warpgroups < 3 else 32) else 1
        staging = num_warpgroups * min(rows, CHUNK) * CELL_OUTPUTS * 4
        num_stages = min(16, (SMEM_BYTES - staging) // _stage_bytes(rows, num_warpgroups))
        for num_parts in range(1, min(9, groups // unroll + 1)):
            cut = Plan(rows, num_warpgroups, num_parts, num_stages, unroll)
            time = _microseconds(cut, M, row_tiles * N // tile_n, groups, out_bytes)
            if time < best[0]:
                best = time, cut
    if best[1] is None:
        raise NotImplementedError(f"a product with {N} columns")
    return best[1]


def _stage_bytes(rows: int, num_warpgroups: int) -> int:
    return num_warpgroups * (CELL_WORDS + CELL_OUTPUTS) * 4 + rows * GROUP * 2


def _microseconds(cut: Plan, M: int, tiles: int, groups: int, out_bytes: int) -> float:
    rows, num_warpgroups, num_parts, _, unroll = cut
    turns = -(-tiles * num_parts // NUM_SMS)
    steps = turns * -(-(groups // unroll) // num_parts) * unroll  # groups of the busiest block
    from_memory = _stage_bytes(0, num_warpgroups) / (3.0e6 / NUM_SMS)  # of a group, at an SM's share of 3.0 TB/s
    from_cache = _stage_bytes(rows, num_warpgroups) / (5.5e6 / NUM_SMS)
    multiply = num_warpgroups * 2 * CELL_OUTPUTS * GROUP * max(rows, 32) / (600e6 / NUM_SMS)
    alone = 0.5 / unroll  # of one warpgroup, which waits for each of its steps
    outputs = tiles * num_warpgroups * CELL_OUTPUTS * rows
    results = outputs * (2 * 4 * num_parts if num_parts > 1 else out_bytes) / 2e6  # written and read, from the cache
    return steps * max(from_memory, from_cache, multiply, alone) + turns * 0.5 + results


def int4_matmul_mosaic(
    x: jax.Array, words: jax.Array, scales_zeros: jax.Array, *, interpret: bool, cut: Plan | None = None
) -> jax.Array:
    (M, D), N = x.shape, scales_zeros.shape[1]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel multiplies bfloat16 or float16, not {x.dtype}")
    cut = cut or plan(M, D, N, x.dtype.itemsize)
    if interpret:  # whole tiles, and rows that belong to nobody may hold anything
        x = jnp.pad(x, ((0, -M % cut.rows), (0, 0)), constant_values=jnp.nan)
        return _product(x, words, scales_zeros, out_rows=x.shape[0], cut=cut, interpret=True)[:, :M]
    # Rows come in boxes of whole 8-row tiles. What a box has beyond x, TMA fills with zeros: padding x costs a kernel.
    if M > 8:
        x = jnp.pad(x, ((0, -M % 8), (0, 0)))
    return _product(x, words, scales_zeros, out_rows=M, cut=cut, interpret=False)


@functools.partial(jax.jit, static_argnames=("out_rows", "cut", "interpret"))  # one trace and kernel for all layers
def _product(x, words, scales_zeros, *, out_rows: int, cut: Plan, interpret: bool) -> jax.Array:
    """[num_parts, out_rows, N]."""
    D, N = x.shape[1], scales_zeros.shape[1]
    rows, num_warpgroups, num_parts, num_stages, unroll = cut
    dtype = x.dtype if num_parts == 1 else jnp.dtype(jnp.float32)
    row_tiles = -(-out_rows // rows)
    chunks = [(row, min(CHUNK, rows - row)) for row in range(0, rows, CHUNK)]
    tile_n = num_warpgroups * CELL_OUTPUTS
    cell_lines = CELL_WORDS // 128  # TMA wants rows of at most 256 elements
    num_units = N // tile_n * num_parts * row_tiles
    num_blocks = min(NUM_SMS, num_units)
    steps = D // GROUP // unroll
    words = words.reshape(D // GROUP, N // CELL_OUTPUTS * cell_lines, 128)

    def int4_matmul_kernel(x_ref, words_ref, scales_ref, out_ref, x_smem, words_smem, scales_smem, out_smem,
                           full, empty):  # fmt: skip
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

        def for_each_unit(handle):
            """Calls `handle(groups so far, first row, part, first column, first group, number of groups)`.

            Units of the same weights follow each other, so that one block's are in the cache for the next.
            """

            def body(turn, done):
                unit = block + turn * num_blocks
                first_row = pl.multiple_of(lax.rem(unit, jnp.int32(row_tiles)) * rows, 8)
                unit = lax.div(unit, jnp.int32(row_tiles))
                part = lax.rem(unit, jnp.int32(num_parts))
                column = pl.multiple_of(lax.div(unit, jnp.int32(num_parts)) * tile_n, tile_n)
                first = lax.div(part * steps, jnp.int32(num_parts))
                count = lax.div((part + 1) * steps, jnp.int32(num_parts)) - first
                handle(done, first_row, part, column, first * unroll, count * unroll)
                return done + count * unroll

            lax.fori_loop(0, lax.div(num_units - 1 - block, jnp.int32(num_blocks)) + 1, body, jnp.int32(0))

        @pl.when(warpgroup < num_warpgroups)
        def _multiply():
            if num_warpgroups > 1:
                plgpu.set_max_registers(232 if num_warpgroups == 2 else 152, action="increase")

            def fetched(slot):
                """q - zero [64, 128] of this warpgroup's cell, and the scales [64]."""
                plgpu.barrier_wait(full.at[slot])
                cell = words_smem.at[slot, pl.ds(warpgroup * cell_lines, cell_lines)]
                outputs = pl.ds(warpgroup * CELL_OUTPUTS, CELL_OUTPUTS)
                scale_word = plgpu.load(scales_smem.at[slot, outputs], layout=OUTPUTS)
                scales = lax.bitcast_convert_type(scale_word & ~ZERO_MASK, jnp.float32)
                if interpret:
                    q = unpack_weights(cell[...].reshape(1, 1, CELL_WORDS))
                    return (q - (scale_word & ZERO_MASK)[:, None]).astype(x.dtype), scales
                return centred_weights(plgpu.load(cell, layout=WORDS), scale_word, x.dtype), scales

            def products(slots, row, size, cells):
                """Of each slot's cell and x's rows [row, row + size): [64, size], not yet scaled, and the scales."""
                x_tiles = [x_smem.at[slot, pl.ds(row, size)] for slot in slots]
                if interpret:
                    cells = cells or [fetched(slot) for slot in slots]
                    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
                    return [(dot(w, x[...].T), scales) for x, (w, scales) in zip(x_tiles, cells, strict=True)]

                def run(*accs):
                    all_scales = []
                    for i, (acc, x_tile) in enumerate(zip(accs, x_tiles, strict=True)):
                        w, scales = cells[i] if cells else fetched(slots[i])  # while the product before is computed
                        plgpu.wgmma(acc, w, x_tile.transpose((1, 0)))
                        all_scales.append(scales)
                    return [(acc[...], scales) for acc, scales in zip(accs, all_scales, strict=True)]

                return pl.run_scoped(run, *[plgpu.ACC((CELL_OUTPUTS, size), jnp.float32)] * len(slots))

            def handle(done, first_row, part, column, first, count):
                del first

                def step(i, sums):
                    slots = [lax.rem(done + i * unroll + u, jnp.int32(num_stages)) for u in range(unroll)]
                    cells = [fetched(slot) for slot in slots] if len(chunks) > 1 else None
                    sums = list(sums)
                    for j, (row, size) in enumerate(chunks):
                        for product, scales in products(slots, row, size, cells):
                            sums[j] = sums[j] + product * lax.broadcast_in_dim(scales, product.shape, [0])
                    for slot in slots:
                        plgpu.barrier_arrive(empty.at[slot])
                    return tuple(sums)

                zeros = [jnp.full((CELL_OUTPUTS, size), 0, jnp.float32) for _, size in chunks]
                zeros = tuple(plgpu.layout_cast(zero, plgpu.Layout.WGMMA) for zero in zeros)
                sums = lax.fori_loop(0, lax.div(count, jnp.int32(unroll)), step, zeros)
                own = pl.ds(column + warpgroup * CELL_OUTPUTS, CELL_OUTPUTS)
                for (row, size), total in zip(chunks, sums, strict=True):
                    if row_tiles == 1:  # of several, the last may end beyond out_ref, and TMA leaves that out
                        size = min(size, out_rows - row)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    target, total = out_smem.at[warpgroup, pl.ds(0, total.shape[1])], total.astype(dtype)
                    if interpret:
                        target[...] = total.T
                    else:
                        store_transposed(target, total)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[warpgroup, pl.ds(0, size)], out_ref.at[part, pl.ds(first_row + row, size), own]
                    )

            for_each_unit(handle)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == num_warpgroups)
        def _fetch():
            if num_warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")

            def handle(done, first_row, part, column, first, count):
                del part
                line = pl.multiple_of(column // CELL_OUTPUTS * cell_lines, cell_lines)

                def step(i, _):
                    slot, group = lax.rem(done + i, jnp.int32(num_stages)), first + i
                    pl.when(done + i >= num_stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    lines = pl.ds(line, num_warpgroups * cell_lines)
                    plgpu.copy_gmem_to_smem(words_ref.at[group, lines], words_smem.at[slot], full.at[slot])
                    tile = scales_ref.at[group, pl.ds(column, tile_n)]
                    plgpu.copy_gmem_to_smem(tile, scales_smem.at[slot], full.at[slot])
                    inputs = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
                    plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(first_row, rows), inputs], x_smem.at[slot], full.at[slot])

                lax.fori_loop(0, count, step, None)

            for_each_unit(handle)

    return plgpu.kernel(
        int4_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((num_parts, out_rows, N), dtype),
        scratch_types=[
            plgpu.SMEM((num_stages, rows, GROUP), x.dtype, transforms=TILED),
            plgpu.SMEM((num_stages, num_warpgroups * cell_lines, 128), jnp.int32),
            plgpu.SMEM((num_stages, tile_n), jnp.int32),
            plgpu.SMEM((num_warpgroups, min(rows, CHUNK), CELL_OUTPUTS), dtype),
            plgpu.Barrier(num_arrivals=3, num_barriers=num_stages),
            plgpu.Barrier(num_arrivals=num_warpgroups, num_barriers=num_stages),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, words, scales_zeros)

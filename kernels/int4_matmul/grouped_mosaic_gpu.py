"""The products of a mixture of experts on Hopper: (tile of rows, tile of columns) units along the work list.

As in `mosaic_gpu`: one warpgroup fetches with TMA, each of the others makes q - zero of its cells in registers and
multiplies them by x transposed into fresh accumulators, which it adds to its own times the group's scale. Of a gated
product a warpgroup has a cell of gate and the same one of up.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.int4_matmul.mosaic_gpu import CHUNK, NUM_SMS, SMEM_BYTES, TILED
from qjax.kernels.int4_matmul.packing import CELL_OUTPUTS, CELL_WORDS, GROUP, ZERO_MASK
from qjax.kernels.int4_matmul.reference import unpack_weights
from qjax.kernels.int4_matmul.registers import OUTPUTS, WORDS, centred_weights, store_transposed

MAX_STAGES = 12
CELL_LINES = CELL_WORDS // 128  # TMA wants rows of at most 256 elements


class Plan(NamedTuple):
    """How a product is cut."""

    rows: int  # of a unit: of a tile, or half of one, for the registers' sake
    num_warpgroups: int  # that multiply, each 64 outputs of a column tile
    num_stages: int
    unroll: int  # groups whose products are in flight together


@functools.cache
def plan(tile: int, max_tiles: int, D: int, N: int, is_gated: bool) -> Plan:
    """For at most `max_tiles` tiles of `tile` rows and N columns of the result.

    Raises:
      NotImplementedError: there is none.
    """
    if tile not in (8, 16, 32, 64, 128) or N % CELL_OUTPUTS:
        raise NotImplementedError(f"tiles of {tile} rows and {N} columns")
    tile_n = 2 * CELL_OUTPUTS
    fills = N % tile_n == 0 and max_tiles * N // tile_n >= NUM_SMS - 8  # with two warpgroups every SM has work
    num_warpgroups = 2 if fills else 1
    rows = min(tile, CHUNK) if is_gated else tile
    unroll = 2 if not is_gated and D // GROUP % 2 == 0 and tile <= CHUNK else 1
    stages = (SMEM_BYTES - staging_bytes(rows, num_warpgroups)) // stage_bytes(rows, num_warpgroups, is_gated)
    return Plan(rows, num_warpgroups, min(MAX_STAGES, stages), unroll)


def staging_bytes(rows: int, num_warpgroups: int) -> int:
    return num_warpgroups * min(rows, CHUNK) * CELL_OUTPUTS * 2


def stage_bytes(rows: int, num_warpgroups: int, is_gated: bool) -> int:
    return (1 + is_gated) * num_warpgroups * (CELL_WORDS + CELL_OUTPUTS) * 4 + rows * GROUP * 2


def grouped_int4_matmul_mosaic(
    x: jax.Array,
    words: jax.Array,
    scales_zeros: jax.Array,
    work: jax.Array,
    *,
    is_gated: bool,
    interpret: bool,
    cut: Plan | None = None,
) -> jax.Array:
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel multiplies bfloat16 or float16, not {x.dtype}")
    E, groups, *_, N = scales_zeros.shape
    max_tiles = work.shape[0] - 1
    cut = cut or plan(x.shape[0] // max_tiles, max_tiles, x.shape[1], N, is_gated)
    words, scales_zeros = words.reshape(E, groups, -1, 128), scales_zeros.reshape(E, groups, -1)
    return _product(x, words, scales_zeros, work, cut=cut, is_gated=is_gated, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("cut", "is_gated", "interpret"))  # one trace and kernel for all layers
def _product(x, words, scales_zeros, work, *, cut: Plan, is_gated: bool, interpret: bool) -> jax.Array:
    """words [E, D / 128, sides * N / 8, 128], scales_zeros [E, D / 128, sides * N] → [R, N]."""
    rows, num_warpgroups, num_stages, unroll = cut
    (R, D), sides = x.shape, 1 + is_gated
    N, max_tiles = scales_zeros.shape[2] // sides, work.shape[0] - 1
    parts, tile_n = R // max_tiles // rows, num_warpgroups * CELL_OUTPUTS  # of a tile
    chunks = [(row, min(CHUNK, rows - row)) for row in range(0, rows, CHUNK)]
    columns, groups = N // tile_n, D // GROUP
    num_blocks = min(NUM_SMS, max_tiles * parts * columns)
    tile_lines = num_warpgroups * CELL_LINES
    cells = [(u, side) for u in range(unroll) for side in range(sides)]  # of a step of one warpgroup

    def grouped_int4_matmul_kernel(x_ref, words_ref, scales_ref, work_ref, out_ref, x_smem, words_smem, scales_smem,
                                   out_smem, full, empty):  # fmt: skip
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

        def for_each_unit(handle):
            """Calls `handle(groups so far, expert, first row, first column)`, the same rows first; all groups."""

            def body(turn, done):
                unit = block + turn * num_blocks
                index = lax.div(unit, jnp.int32(columns))
                row = pl.multiple_of(index * rows, rows)
                column = pl.multiple_of(lax.rem(unit, jnp.int32(columns)) * tile_n, tile_n)
                handle(done, work_ref[1 + lax.div(index, jnp.int32(parts))], row, column)
                return done + groups

            turns = lax.div(work_ref[0] * (parts * columns) - block + num_blocks - 1, jnp.int32(num_blocks))
            return lax.fori_loop(0, turns, body, jnp.int32(0))

        @pl.when(warpgroup < num_warpgroups)
        def _multiply():
            if num_warpgroups > 1:
                plgpu.set_max_registers(232, action="increase")

            def fetched(slot, side):
                """q - zero [64, 128] of this warpgroup's cell, and the scales [64]."""
                if side == 0:
                    plgpu.barrier_wait(full.at[slot])
                cell = words_smem.at[slot, pl.ds(side * tile_lines + warpgroup * CELL_LINES, CELL_LINES)]
                outputs = pl.ds(side * tile_n + warpgroup * CELL_OUTPUTS, CELL_OUTPUTS)
                scale_word = plgpu.load(scales_smem.at[slot, outputs], layout=OUTPUTS)
                scales = lax.bitcast_convert_type(scale_word & ~ZERO_MASK, jnp.float32)
                if interpret:
                    q = unpack_weights(cell[...].reshape(1, 1, CELL_WORDS))
                    return (q - (scale_word & ZERO_MASK)[:, None]).astype(x.dtype), scales
                return centred_weights(plgpu.load(cell, layout=WORDS), scale_word, x.dtype), scales

            def products(pairs, row, size, weights):
                """Of some (slot, side) and x's rows [row, row + size): [64, size], not yet scaled, and the scales.

                weights: None, or what `fetched` gave.
                """
                x_tiles = [x_smem.at[slot, pl.ds(row, size)] for slot, _ in pairs]
                if interpret:
                    weights = weights or [fetched(*pair) for pair in pairs]
                    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
                    return [(dot(w, x[...].T), scales) for x, (w, scales) in zip(x_tiles, weights, strict=True)]

                def run(*accs):
                    all_scales = []
                    for i, (acc, x_tile) in enumerate(zip(accs, x_tiles, strict=True)):
                        w, scales = weights[i] if weights else fetched(*pairs[i])  # while the one before is multiplied
                        plgpu.wgmma(acc, w, x_tile.transpose((1, 0)))
                        all_scales.append(scales)
                    return [(acc[...], scales) for acc, scales in zip(accs, all_scales, strict=True)]

                return pl.run_scoped(run, *[plgpu.ACC((CELL_OUTPUTS, size), jnp.float32)] * len(pairs))

            def handle(done, expert, row, column):
                del expert

                def step(i, sums):
                    slots = [lax.rem(done + i * unroll + u, jnp.int32(num_stages)) for u in range(unroll)]
                    pairs, sums = [(slots[u], side) for u, side in cells], list(sums)

                    def add(j, side, product, scales):
                        where = side * len(chunks) + j
                        sums[where] = sums[where] + product * lax.broadcast_in_dim(scales, product.shape, [0])

                    if len(chunks) == 1:
                        for (_, side), product in zip(pairs, products(pairs, *chunks[0], None), strict=True):
                            add(0, side, *product)
                    else:
                        for pair in pairs:
                            weights = [fetched(*pair)]
                            for j, chunk in enumerate(chunks):
                                add(j, pair[1], *products([pair], *chunk, weights)[0])
                    for slot in slots:
                        plgpu.barrier_arrive(empty.at[slot])
                    return tuple(sums)

                zeros = [jnp.full((CELL_OUTPUTS, size), 0, jnp.float32) for _, size in chunks] * sides
                zeros = tuple(plgpu.layout_cast(zero, plgpu.Layout.WGMMA) for zero in zeros)
                sums = lax.fori_loop(0, groups // unroll, step, zeros)
                own = pl.ds(column + warpgroup * CELL_OUTPUTS, CELL_OUTPUTS)
                for j, (first, size) in enumerate(chunks):
                    result = sums[j]
                    if is_gated:
                        result = result / (1 + jnp.exp(-result)) * sums[len(chunks) + j]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    target, result = out_smem.at[warpgroup, pl.ds(0, size)], result.astype(x.dtype)
                    if interpret:
                        target[...] = result.T
                    else:
                        store_transposed(target, result)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(target, out_ref.at[pl.ds(row + first, size), own])

            for_each_unit(handle)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == num_warpgroups)
        def _fetch():
            if num_warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")

            def handle(done, expert, row, column):
                line = pl.multiple_of(column // CELL_OUTPUTS * CELL_LINES, CELL_LINES)

                def step(group, _):
                    slot = lax.rem(done + group, jnp.int32(num_stages))
                    pl.when(done + group >= num_stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    for side in range(sides):
                        lines = pl.ds(side * (N // CELL_OUTPUTS * CELL_LINES) + line, tile_lines)
                        target = words_smem.at[slot, pl.ds(side * tile_lines, tile_lines)]
                        plgpu.copy_gmem_to_smem(words_ref.at[expert, group, lines], target, full.at[slot])
                        target = scales_smem.at[slot, pl.ds(side * tile_n, tile_n)]
                        outputs = pl.ds(side * N + column, tile_n)
                        plgpu.copy_gmem_to_smem(scales_ref.at[expert, group, outputs], target, full.at[slot])
                    inputs = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
                    plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, rows), inputs], x_smem.at[slot], full.at[slot])

                lax.fori_loop(0, groups, step, None)

            done = for_each_unit(handle)
            # No block ends before its barriers are all waited for.
            wait = lambda i, _: plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(num_stages))])
            lax.fori_loop(jnp.maximum(done - num_stages, 0), done, wait, None)

    return plgpu.kernel(
        grouped_int4_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((R, N), x.dtype),
        scratch_types=[
            plgpu.SMEM((num_stages, rows, GROUP), x.dtype, transforms=TILED),
            plgpu.SMEM((num_stages, sides * tile_lines, 128), jnp.int32),
            plgpu.SMEM((num_stages, sides * tile_n), jnp.int32),
            plgpu.SMEM((num_warpgroups, min(rows, CHUNK), CELL_OUTPUTS), x.dtype),
            plgpu.Barrier(num_arrivals=1 + 2 * sides, num_barriers=num_stages),
            plgpu.Barrier(num_arrivals=num_warpgroups, num_barriers=num_stages),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, words, scales_zeros, work)

"""The products of a mixture of experts on Hopper: (tile of rows, tile of columns) units along the work list.

As in `mosaic_gpu`: one warpgroup fetches with TMA, others multiply a block of D at a time into fresh accumulators and
add those to float32 sums, times the scales. Small tiles, those of a decode step, arrive in their own dtype and one more
warpgroup rounds them to FP8; larger ones are rounded before. What takes the time of a decode step are the weights: its
units are small, so that few experts fill the GPU. The gate and the up projection are one product with two sums.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.fp8_matmul.mosaic_gpu import (
    MATRIX,
    MAX_ROUNDED_ROWS,
    NUM_SMS,
    PIECE,
    ROWS,
    SMEM_BYTES,
    quantize_rows_mosaic,
    rounded,
    tiled,
)
from qjax.kernels.fp8_matmul.reference import E4M3

MAX_STAGES = 8


class Plan(NamedTuple):
    """How a product is cut."""

    num_warpgroups: int  # that multiply 64 rows each; fewer rows are there in a smaller tile
    tile_n: int  # columns of the result; of a gated product those of gate and of up
    num_stages: int
    is_rounded: bool  # x is FP8 before the kernel


@functools.cache
def plan(tile: int, N: int, block_n: int, block_d: int, is_gated: bool) -> Plan:
    """For tiles of `tile` rows and N columns of the result.

    Args:
      block_n, block_d: the outputs and inputs of an expert that share a scale.
    Raises:
      NotImplementedError: there is none.
    """
    if tile not in (8, 16, 32, 64, 128) or block_d not in (64, 128) or block_n % PIECE:
        raise NotImplementedError(f"tiles of {tile} rows and scales of {block_n} x {block_d} weights")
    sides, num_warpgroups = 1 + is_gated, max(1, tile // PIECE)
    is_rounded = tile > MAX_ROUNDED_ROWS
    tile_n = (256 if num_warpgroups == 2 else 128) // sides
    while N % tile_n:
        tile_n //= 2
    if tile_n < PIECE:
        raise NotImplementedError(f"a product with {N} columns")
    return Plan(num_warpgroups, tile_n, num_stages_of(tile, sides * tile_n, block_d, is_rounded), is_rounded)


def num_stages_of(tile: int, columns: int, block_d: int, is_rounded: bool) -> int:
    rows, came = max(PIECE, tile), 0 if is_rounded else 2 * tile
    stage = (rows + came + columns) * block_d + 1024  # rounded, as it came, weights; scales
    return min(MAX_STAGES, (SMEM_BYTES - rows * PIECE * 2) // stage)


def grouped_fp8_matmul_mosaic(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    work: jax.Array,
    *,
    is_gated: bool,
    interpret: bool,
    cut: Plan | None = None,
) -> jax.Array:
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes rows of bfloat16 or float16, not {x.dtype}")
    (E, *_, N, D), blocks = w.shape, scale.shape[-2:]
    cut = cut or plan(x.shape[0] // (work.shape[0] - 1), N, N // blocks[0], D // blocks[1], is_gated)
    inputs = quantize_rows_mosaic(x, D // blocks[1], interpret=interpret) if cut.is_rounded else (x,)
    w, scale = w.reshape(E, -1, D), scale.reshape(E, -1, blocks[1])
    return _product(w, scale, work, *inputs, cut=cut, is_gated=is_gated, dtype=x.dtype, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("cut", "is_gated", "dtype", "interpret"))  # one trace for all layers
def _product(w, scale, work, x, *row_scales, cut: Plan, is_gated: bool, dtype, interpret: bool) -> jax.Array:
    """w [E, sides * N, D] → [R, N]."""
    num_warpgroups, tile_n, num_stages, is_rounded = cut
    (R, D), sides = x.shape, 1 + is_gated
    N, max_tiles = w.shape[1] // sides, work.shape[0] - 1
    tile = R // max_tiles
    block_n, block_d = w.shape[1] // scale.shape[1], D // scale.shape[2]
    count_rows = min(PIECE, tile)  # of one warpgroup
    pieces = [(side, n) for n in range(0, tile_n, PIECE) for side in range(sides)]  # multiplied side by side
    together = 2 if num_warpgroups == 1 else 1  # whose products are in flight at once, for the registers' sake
    columns, steps = N // tile_n, D // block_d
    num_blocks = min(NUM_SMS, max_tiles * columns)
    num_threads = num_warpgroups + (1 if is_rounded else 2)

    def grouped_fp8_matmul_kernel(w_ref, scale_ref, work_ref, x_ref, *refs):
        refs = list(refs)
        row_scale_ref = refs.pop(0) if is_rounded else None
        out_ref, x_smem, w_smem, row_scale_smem, out_smem, full, empty, *came = refs
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

        def for_each_unit(handle):
            """Calls `handle(steps so far, expert, first row, first column)`, a tile's columns first; all steps."""

            def body(turn, done):
                unit = block + turn * num_blocks
                index = lax.div(unit, jnp.int32(columns))
                row = pl.multiple_of(index * tile, tile)
                column = pl.multiple_of(lax.rem(unit, jnp.int32(columns)) * tile_n, tile_n)
                handle(done, work_ref[1 + index], row, column)
                return done + steps

            turns = lax.div(work_ref[0] * columns - block + num_blocks - 1, jnp.int32(num_blocks))
            return lax.fori_loop(0, turns, body, jnp.int32(0))

        def slot_of(step):
            return lax.rem(step, jnp.int32(num_stages))

        @pl.when(warpgroup < num_warpgroups)
        def _multiply():
            if num_warpgroups > 1:
                plgpu.set_max_registers(240, action="increase")
            own = pl.ds(pl.multiple_of(warpgroup * PIECE, PIECE), PIECE)

            def products(slot, some):
                """Of a block of D and some pieces."""
                x_tile = x_smem.at[slot, own]
                w_tiles = [w_smem.at[slot, pl.ds(side * tile_n + n, PIECE)] for side, n in some]
                if interpret:
                    return [jnp.dot(x_tile[...].astype(jnp.float32), w[...].astype(jnp.float32).T) for w in w_tiles]

                def run(*accs):
                    for acc, w_tile in zip(accs, w_tiles, strict=True):
                        plgpu.wgmma(acc, x_tile, w_tile.transpose((1, 0)))
                    return [acc[...] for acc in accs]

                return pl.run_scoped(run, *[plgpu.ACC((PIECE, PIECE), jnp.float32)] * len(some))

            def handle(done, expert, row, column):
                def step(i, sums):
                    slot = slot_of(done + i)
                    # Asked for before the wait, there after it.
                    scale_of = {
                        (side, j): scale_ref[expert, lax.div(side * N + column, jnp.int32(block_n)) + j, i]
                        for side, j in dict.fromkeys((side, n // block_n) for side, n in pieces)
                    }
                    column_scales = [scale_of[side, n // block_n] for side, n in pieces]
                    plgpu.barrier_wait(full.at[slot])
                    new_sums = []
                    for first in range(0, len(pieces), together):
                        some = slice(first, first + together)
                        row_scale = plgpu.load(row_scale_smem.at[slot, own], layout=ROWS)
                        values = products(slot, pieces[some])
                        if first + together >= len(pieces):
                            plgpu.barrier_arrive(empty.at[slot])
                        for value, total, column_scale in zip(values, sums[some], column_scales[some], strict=True):
                            scales = lax.broadcast_in_dim(row_scale, value.shape, [0])
                            new_sums.append(total + value * scales * column_scale)
                    return tuple(new_sums)

                zeros = plgpu.layout_cast(jnp.full((PIECE, PIECE), 0, jnp.float32), MATRIX)
                sums = lax.fori_loop(0, steps, step, (zeros,) * len(pieces))
                for first in range(0, len(pieces), sides):
                    result = sums[first]
                    if is_gated:
                        result = result / (1 + jnp.exp(-result)) * sums[first + 1]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem[warpgroup] = result.astype(dtype)
                    plgpu.commit_smem()
                    rows, n = pl.ds(row + warpgroup * PIECE, count_rows), pieces[first][1]
                    target = out_ref.at[rows, pl.ds(column + n, PIECE)]
                    plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, pl.ds(0, count_rows)], target)

            for_each_unit(handle)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == num_threads - 1)
        def _fetch():
            if num_warpgroups > 1:
                plgpu.set_max_registers(24, action="decrease")

            def handle(done, expert, row, column):
                def step(i, _):
                    slot = slot_of(done + i)
                    pl.when(done + i >= num_stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    deep = pl.ds(pl.multiple_of(i * block_d, block_d), block_d)
                    for side in range(sides):
                        weights = w_ref.at[expert, pl.ds(side * N + column, tile_n), deep]
                        plgpu.copy_gmem_to_smem(weights, w_smem.at[slot, pl.ds(side * tile_n, tile_n)], full.at[slot])
                    rows, box = pl.ds(row, tile), pl.ds(0, tile)
                    if is_rounded:
                        plgpu.copy_gmem_to_smem(x_ref.at[rows, deep], x_smem.at[slot, box], full.at[slot])
                        plgpu.copy_gmem_to_smem(row_scale_ref.at[i, rows], row_scale_smem.at[slot, box], full.at[slot])
                    else:
                        plgpu.copy_gmem_to_smem(x_ref.at[rows, deep], came[0].at[slot], came[1].at[slot])

                lax.fori_loop(0, steps, step, None)

            done = for_each_unit(handle)
            # No block ends before its barriers are all waited for.
            wait = lambda i, _: plgpu.barrier_wait(empty.at[slot_of(i)])
            lax.fori_loop(jnp.maximum(done - num_stages, 0), done, wait, None)

        if not is_rounded:

            @pl.when(warpgroup == num_warpgroups)
            def _round():
                def handle(done, expert, row, column):
                    del expert, row, column

                    def step(i, _):
                        slot = slot_of(done + i)
                        plgpu.barrier_wait(came[1].at[slot])  # so the slot's last products are done as well
                        x_smem[slot, :tile], row_scale_smem[slot, :tile] = rounded(came[0].at[slot])
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(full.at[slot])

                    lax.fori_loop(0, steps, step, None)

                for_each_unit(handle)

    rows = num_warpgroups * PIECE
    came: list[Any] = [
        plgpu.SMEM((num_stages, tile, block_d), dtype, transforms=tiled(block_d, 2)),
        plgpu.Barrier(num_barriers=num_stages),
    ]
    return plgpu.kernel(
        grouped_fp8_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((R, N), dtype),
        scratch_types=[
            plgpu.SMEM((num_stages, rows, block_d), E4M3, transforms=tiled(block_d, 1)),
            plgpu.SMEM((num_stages, sides * tile_n, block_d), E4M3, transforms=tiled(block_d, 1)),
            plgpu.SMEM((num_stages, rows), jnp.float32),
            plgpu.SMEM((num_warpgroups, PIECE, PIECE), dtype, transforms=tiled(PIECE, 2)),
            plgpu.Barrier(num_arrivals=sides + (2 if is_rounded else 1), num_barriers=num_stages),
            plgpu.Barrier(num_arrivals=num_warpgroups, num_barriers=num_stages),
            *([] if is_rounded else came),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=num_threads,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(w, scale, work, x, *row_scales)

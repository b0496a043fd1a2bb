"""The products on Hopper: a persistent grid of (tile of rows, tile of columns) units along the work list.

One warpgroup fetches tiles of x and of the expert's weights with TMA, the others multiply. For a decode step the
weights are what takes the time: only rows that are there are fetched, and the columns are cut finely enough for few
experts to fill the GPU. The gate and the up projection are one product with two accumulators.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

NUM_SMS = 132  # of an H100 or H200; only a guide for how to cut the work
MAX_STAGES = 8
TILE_D = 64  # what one 128-byte swizzle holds
SMEM_BYTES = 227 * 1024 - 2048  # a block's most, less the barriers
PIECE = (64, 64)  # of a result that leaves through shared memory at once
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


class Plan(NamedTuple):
    """How a product is cut."""

    num_warpgroups: int  # that multiply 64 rows each; fewer rows are there in a smaller tile
    tile_n: int  # columns of the result; of a gated product those of gate and of up
    num_stages: int


@functools.cache
def plan(tile: int, D: int, N: int, is_gated: bool) -> Plan:
    """For tiles of `tile` rows and N columns of the result.

    Raises:
      NotImplementedError: there is none.
    """
    if tile not in (8, 16, 32, 64, 128) or D % TILE_D:
        raise NotImplementedError(f"tiles of {tile} rows over {D} columns")
    sides, num_warpgroups = 1 + is_gated, max(1, tile // 64)
    tile_n = (256 if num_warpgroups == 2 else 128) // sides
    while N % tile_n:
        tile_n //= 2
    if tile_n < PIECE[1]:
        raise NotImplementedError(f"a product with {N} columns")
    stage = (num_warpgroups * 64 + sides * tile_n) * TILE_D * 2
    staging = num_warpgroups * math.prod(PIECE) * 2
    return Plan(num_warpgroups, tile_n, min(MAX_STAGES, (SMEM_BYTES - staging) // stage))


def grouped_matmul_mosaic(
    x: jax.Array, w: jax.Array, work: jax.Array, *, is_gated: bool, interpret: bool, cut: Plan | None = None
) -> jax.Array:
    if x.dtype not in (jnp.bfloat16, jnp.float16) or w.dtype != x.dtype:
        raise NotImplementedError(f"the kernel multiplies bfloat16 or float16, not {x.dtype} and {w.dtype}")
    E, D = w.shape[:2]
    cut = cut or plan(x.shape[0] // (work.shape[0] - 1), D, w.shape[-1], is_gated)
    return _product(x, w.reshape(E, D, -1), work, cut=cut, is_gated=is_gated, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("cut", "is_gated", "interpret"))  # one trace and kernel for all layers
def _product(x, w, work, *, cut: Plan, is_gated: bool, interpret: bool) -> jax.Array:
    """w [E, D, sides * N] → [R, N]."""
    num_warpgroups, tile_n, num_stages = cut
    (R, D), sides = x.shape, 1 + is_gated
    N, max_tiles = w.shape[2] // sides, work.shape[0] - 1
    tile = R // max_tiles
    count_rows = min(PIECE[0], tile)  # of one warpgroup
    columns, steps = N // tile_n, D // TILE_D
    num_blocks = min(NUM_SMS, max_tiles * columns)

    def grouped_matmul_kernel(x_ref, w_ref, work_ref, out_ref, x_smem, w_smem, out_smem, full, empty):
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

        def for_each_unit(handle):
            """Calls `handle(steps so far, tile, first row, first column)`, a tile's columns first; all steps."""

            def body(turn, done):
                unit = block + turn * num_blocks
                index = lax.div(unit, jnp.int32(columns))
                row = pl.multiple_of(index * tile, tile)
                column = pl.multiple_of(lax.rem(unit, jnp.int32(columns)) * tile_n, tile_n)
                handle(done, index, row, column)
                return done + steps

            turns = lax.div(work_ref[0] * columns - block + num_blocks - 1, jnp.int32(num_blocks))
            return lax.fori_loop(0, turns, body, jnp.int32(0))

        @pl.when(warpgroup < num_warpgroups)
        def _multiply():
            if num_warpgroups > 1:
                plgpu.set_max_registers(232, action="increase")
            own = pl.ds(pl.multiple_of(warpgroup * 64, 64), 64)

            def handle(done, index, row, column):
                del index

                def step(i, accs):
                    slot = lax.rem(done + i, jnp.int32(num_stages))
                    plgpu.barrier_wait(full.at[slot])
                    x_tile = x_smem.at[slot, own]
                    if interpret:
                        dots = [jnp.dot(x_tile[...], w_smem[slot, side]).astype(jnp.float32) for side in range(sides)]
                        plgpu.barrier_arrive(empty.at[slot])
                        return tuple(acc + dot for acc, dot in zip(accs, dots, strict=True))
                    for side, acc in enumerate(accs):
                        plgpu.wgmma(acc, x_tile, w_smem.at[slot, side])
                    plgpu.wgmma_wait(sides)  # the products of the step before have been read

                    @pl.when(i > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(done + i - 1, jnp.int32(num_stages))])

                def product(*accs):
                    lax.fori_loop(0, steps, lambda i, _: step(i, accs), None)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[lax.rem(done + steps - 1, jnp.int32(num_stages))])
                    return tuple(acc[...] for acc in accs)

                if interpret:
                    sums = lax.fori_loop(0, steps, step, (jnp.zeros((64, tile_n), jnp.float32),) * sides)
                else:
                    sums = pl.run_scoped(product, *[plgpu.ACC((64, tile_n), jnp.float32)] * sides)
                result = sums[0]
                if is_gated:
                    result = result / (1 + jnp.exp(-result)) * sums[1]
                result = result.astype(x.dtype)
                for n in range(0, tile_n, PIECE[1]):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem[warpgroup] = result[:, n : n + PIECE[1]]
                    plgpu.commit_smem()
                    target = out_ref.at[pl.ds(row + warpgroup * 64, count_rows), pl.ds(column + n, PIECE[1])]
                    plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, pl.ds(0, count_rows)], target)

            for_each_unit(handle)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == num_warpgroups)
        def _fetch():
            if num_warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")

            def handle(done, index, row, column):
                expert = work_ref[1 + index]

                def step(i, _):
                    slot = lax.rem(done + i, jnp.int32(num_stages))
                    pl.when(done + i >= num_stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    deep = pl.ds(pl.multiple_of(i * TILE_D, TILE_D), TILE_D)
                    for side in range(sides):
                        weights = w_ref.at[expert, deep, pl.ds(side * N + column, tile_n)]
                        plgpu.copy_gmem_to_smem(weights, w_smem.at[slot, side], full.at[slot])
                    rows = x_ref.at[pl.ds(row, tile), deep]
                    plgpu.copy_gmem_to_smem(rows, x_smem.at[slot, pl.ds(0, tile)], full.at[slot])

                lax.fori_loop(0, steps, step, None)

            done = for_each_unit(handle)
            # No block ends before its barriers are all waited for.
            wait = lambda i, _: plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(num_stages))])
            lax.fori_loop(jnp.maximum(done - num_stages, 0), done, wait, None)

    return plgpu.kernel(
        grouped_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((R, N), x.dtype),
        scratch_types=[
            plgpu.SMEM((num_stages, num_warpgroups * 64, TILE_D), x.dtype, transforms=TILED),
            plgpu.SMEM((num_stages, sides, TILE_D, tile_n), w.dtype, transforms=TILED),
            plgpu.SMEM((num_warpgroups, *PIECE), x.dtype),
            plgpu.Barrier(num_arrivals=1 + sides, num_barriers=num_stages),
            plgpu.Barrier(num_arrivals=num_warpgroups, num_barriers=num_stages),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, w, work)

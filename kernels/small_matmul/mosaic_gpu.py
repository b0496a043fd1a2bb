"""The product on Hopper for up to 256 rows: a persistent grid of (column tile, part of the sum) units.

One warpgroup fetches tiles of x and w with TMA, the others multiply. Where there are too few column tiles to fill the
GPU, the sum over D is cut into parts; whoever needs the result adds them up, which costs no kernel of its own.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.elementwise import sum_parts
from qjax.kernels.tiles import swiglu

NUM_SMS = 132  # of an H100 or H200; only a guide for how to cut the work
MAX_ROWS = 256
SMALL_WEIGHT_BYTES = 16 * 2**20  # such as all of 0.6B's
TILE_D = 64  # what one 128-byte swizzle holds
SMEM_BYTES = 227 * 1024 - 2048  # a block's most, less the barriers
EPILOGUE = (64, 64)  # the piece of a result that leaves through shared memory at once
WARPGROUPS = {64: 1, 128: 2, 192: 3, 256: 2}  # that multiply a tile of so many rows
GATED_TILE = 256  # 128 columns of gate, and their 128 of up
GATED_UNITS = 90  # a turn: 96 of Qwen3-8B's were measured to read as fast as memory gives, 48 and 76 were not timed
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


class Plan(NamedTuple):
    """How a product is cut."""

    block_rows: int  # rows of a tile, a multiple of 64
    num_warpgroups: int  # that multiply
    tile_n: int  # columns of the weights; of a gated product half of them gate, half of them up
    num_parts: int  # of the sum over D
    num_stages: int


@functools.cache
def plan(M: int, D: int, N: int, out_bytes: int) -> Plan:
    """The cut with the least estimated time.

    Raises:
      NotImplementedError: there is none.
    """
    # Where this was measured to be quicker than what XLA picks.
    is_best = M <= MAX_ROWS if D * N * 2 <= SMALL_WEIGHT_BYTES else 8 < M <= 128
    if not is_best or D % TILE_D:
        raise NotImplementedError(f"a product of {M} rows over {D} columns")
    block_rows = max(64, -(-M // 64) * 64)
    num_warpgroups = WARPGROUPS[block_rows]
    best: tuple[float, Plan | None] = (math.inf, None)
    for tile_n in (64, 128, 192, 256):
        accumulators = block_rows // num_warpgroups * tile_n // 128  # registers of each thread
        if N % tile_n or accumulators > (96 if num_warpgroups == 3 else 192):
            continue
        for num_parts in range(1, min(9, D // TILE_D + 1)):
            time = _microseconds(M, D, N, block_rows, tile_n, num_parts, out_bytes)
            if time < best[0]:
                best = time, _cut(block_rows, tile_n, num_parts)
    if best[1] is None:
        raise NotImplementedError(f"a product with {N} columns")
    return best[1]


def gated_plan(M: int, D: int, N: int) -> Plan | None:
    """The cut where SwiGLU inside the product is quicker than after it, which takes the whole sum in one part.

    Measured on an H100 with Qwen3-8B's 96 units: docs/LOG.md.
    """
    units = N // GATED_TILE
    turns = -(-units // NUM_SMS)
    if not 8 < M <= 128 or D % TILE_D or N % GATED_TILE or units < GATED_UNITS * turns:
        return None
    return _cut(-(-M // 64) * 64, GATED_TILE, 1)


def _cut(block_rows: int, tile_n: int, num_parts: int) -> Plan:
    """With as many stages as fit into a block's shared memory."""
    num_warpgroups = WARPGROUPS[block_rows]
    staging = num_warpgroups * math.prod(EPILOGUE) * (4 if num_parts > 1 else 2)
    num_stages = min(8, (SMEM_BYTES - staging) // ((block_rows + tile_n) * TILE_D * 2))
    return Plan(block_rows, num_warpgroups, tile_n, num_parts, num_stages)


def _microseconds(M, D, N, block_rows, tile_n, num_parts, out_bytes) -> float:
    units = N // tile_n * num_parts
    steps = -(-units // NUM_SMS) * -(-(D // TILE_D) // num_parts)
    from_memory = TILE_D * tile_n * 2 / (3.0e6 / NUM_SMS)  # of one step, at an SM's share of 3.0 TB/s
    from_cache = TILE_D * (tile_n + block_rows) * 2 / (5.5e6 / NUM_SMS)
    multiply = 2 * block_rows * tile_n * TILE_D / (750e6 / NUM_SMS)
    results = M * N * (2 * 4 * num_parts if num_parts > 1 else out_bytes) / 2e6  # written and read, from the cache
    return steps * max(from_memory, from_cache, multiply) + -(-units // NUM_SMS) * 1.0 + results


def small_matmul_mosaic(
    x: jax.Array, w: jax.Array, *, interpret: bool, is_gated: bool = False, cut: Plan | None = None
) -> jax.Array:
    (M, D), N = x.shape, w.shape[1]
    if x.dtype not in (jnp.bfloat16, jnp.float16) or w.dtype != x.dtype:
        raise NotImplementedError(f"the kernel multiplies bfloat16 or float16, not {x.dtype} and {w.dtype}")
    if is_gated and cut is None:
        cut = gated_plan(M, D, N)
        if cut is None:
            return swiglu(sum_parts(small_matmul_mosaic(x, w, interpret=interpret), x.dtype))[None]
    cut = cut or plan(M, D, N, x.dtype.itemsize)
    num_rows = -(-M // 8) * 8 if M <= 64 else cut.block_rows  # rows come and go in boxes of whole 8-row tiles
    x = jnp.pad(x, ((0, num_rows - M), (0, 0)))  # fused into whatever computed x
    return _product(x, w, cut=cut, is_gated=is_gated, interpret=interpret)[:, :M]


@functools.partial(jax.jit, static_argnames=("cut", "is_gated", "interpret"))  # one trace and kernel for all layers
def _product(x, w, *, cut: Plan, is_gated: bool, interpret: bool) -> jax.Array:
    """[num_parts, rows of x, N]; N is half the columns of w where `is_gated`."""
    block_rows, num_warpgroups, tile_n, num_parts, num_stages = cut
    (num_rows, D), sides = x.shape, 1 + is_gated
    N, tile_n = w.shape[1] // sides, tile_n // sides
    if is_gated and num_parts > 1:
        raise NotImplementedError(f"SwiGLU of a sum in {num_parts} parts")
    dtype = x.dtype if num_parts == 1 else jnp.dtype(jnp.float32)
    rows = block_rows // num_warpgroups  # of one warpgroup
    num_units = N // tile_n * num_parts
    num_blocks = min(NUM_SMS, num_units)
    steps = D // TILE_D

    def small_matmul_kernel(x_ref, w_ref, out_ref, x_smem, w_smem, out_smem, full, empty):
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")

        def for_each_unit(handle):
            """Calls `handle(steps so far, part, first column, first step, number of steps)`; all steps."""

            def body(turn, done):
                unit = block + turn * num_blocks
                part = lax.rem(unit, jnp.int32(num_parts))
                column = pl.multiple_of(lax.div(unit, jnp.int32(num_parts)) * tile_n, tile_n)
                first = lax.div(part * steps, jnp.int32(num_parts))
                count = lax.div((part + 1) * steps, jnp.int32(num_parts)) - first
                handle(done, part, column, first, count)
                return done + count

            turns = lax.div(num_units - 1 - block, jnp.int32(num_blocks)) + 1
            return lax.fori_loop(0, turns, body, jnp.int32(0))

        @pl.when(warpgroup < num_warpgroups)
        def _multiply():
            if num_warpgroups > 1:
                plgpu.set_max_registers(232 if num_warpgroups == 2 else 152, action="increase")
            own = pl.ds(pl.multiple_of(warpgroup * rows, rows), rows)

            def handle(done, part, column, first, count):
                del first

                def step(i, accs):
                    slot = lax.rem(done + i, jnp.int32(num_stages))
                    plgpu.barrier_wait(full.at[slot])
                    x_tile = x_smem.at[slot, own]
                    if interpret:
                        dot = functools.partial(jnp.dot, x_tile[...], preferred_element_type=jnp.float32)
                        accs = tuple(acc + dot(w_smem[slot, side]) for side, acc in enumerate(accs))
                        plgpu.barrier_arrive(empty.at[slot])
                        return accs
                    for side, acc in enumerate(accs):
                        plgpu.wgmma(acc, x_tile, w_smem.at[slot, side])
                    plgpu.wgmma_wait(sides)  # the products of the step before have been read

                    @pl.when(i > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(done + i - 1, jnp.int32(num_stages))])

                def product(*accs):
                    lax.fori_loop(0, count, lambda i, _: step(i, accs), None)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[lax.rem(done + count - 1, jnp.int32(num_stages))])
                    return tuple(acc[...] for acc in accs)

                if interpret:
                    sums = lax.fori_loop(0, count, step, (jnp.zeros((rows, tile_n), jnp.float32),) * sides)
                else:
                    sums = pl.run_scoped(product, *[plgpu.ACC((rows, tile_n), jnp.float32)] * sides)
                result = sums[0]
                if is_gated:
                    result = result / (1 + jnp.exp(-result)) * sums[1]
                result = result.astype(dtype)
                piece_rows, piece_columns = EPILOGUE
                for row in range(0, rows, piece_rows):
                    count_rows = min(piece_rows, num_rows)
                    for n in range(0, tile_n, piece_columns):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out_smem[warpgroup] = result[row : row + piece_rows, n : n + piece_columns]
                        plgpu.commit_smem()
                        target = out_ref.at[
                            part, pl.ds(warpgroup * rows + row, count_rows), pl.ds(column + n, piece_columns)
                        ]
                        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, pl.ds(0, count_rows)], target)

            for_each_unit(handle)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == num_warpgroups)
        def _fetch():
            if num_warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")

            def handle(done, part, column, first, count):
                del part

                def step(i, _):
                    slot = lax.rem(done + i, jnp.int32(num_stages))
                    pl.when(done + i >= num_stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    deep = pl.ds(pl.multiple_of((first + i) * TILE_D, TILE_D), TILE_D)
                    for side in range(sides):
                        weights = w_ref.at[deep, pl.ds(side * N + column, tile_n)]
                        plgpu.copy_gmem_to_smem(weights, w_smem.at[slot, side], full.at[slot])
                    x_rows = x_smem.at[slot, pl.ds(0, num_rows)]
                    plgpu.copy_gmem_to_smem(x_ref.at[:, deep], x_rows, full.at[slot])

                lax.fori_loop(0, count, step, None)

            done = for_each_unit(handle)
            # No block ends before its barriers are all waited for.
            wait = lambda i, _: plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(num_stages))])
            lax.fori_loop(jnp.maximum(done - num_stages, 0), done, wait, None)

    return plgpu.kernel(
        small_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((num_parts, num_rows, N), dtype),
        scratch_types=[
            plgpu.SMEM((num_stages, block_rows, TILE_D), x.dtype, transforms=TILED),
            plgpu.SMEM((num_stages, sides, TILE_D, tile_n), w.dtype, transforms=TILED),
            plgpu.SMEM((num_warpgroups, *EPILOGUE), dtype),
            plgpu.Barrier(num_arrivals=1 + sides, num_barriers=num_stages),
            plgpu.Barrier(num_arrivals=num_warpgroups, num_barriers=num_stages),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, w)

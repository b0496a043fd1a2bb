"""The product on Hopper: a persistent grid of (block of rows, tile of columns, part of the sum) units.

One warpgroup fetches tiles of x and w with TMA, two multiply: a fresh accumulator for each block of D, as the tensor
cores sum FP8 products with few bits, added to float32 sums times the scales of its rows and columns. Few rows arrive
in their own dtype and one more warpgroup rounds them to FP8, which saves a kernel; many are rounded by one before.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.fp8_matmul.reference import E4M3, LARGEST, SMALLEST_AMAX

NUM_SMS = 132  # of an H100 or H200; only a guide for how to cut the work
MAX_ROUNDED_ROWS = 32  # which the kernel itself rounds to FP8
SMEM_BYTES = 227 * 1024 - 2048  # a block's most, less the barriers
PIECE = 64  # rows of a wgmma
LEAVING_BYTES = 128  # of each row of a piece, that leave through shared memory at once
MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of a MATRIX


def strips(columns: int) -> Any:
    """Rows in eights, two a warp, each thread with neighbouring columns: few rows cost little."""
    tiling = Tiling(((8, columns), (2, columns), (columns // 16,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def tiled(columns: int, itemsize: int) -> tuple:
    """Shared memory as TMA and wgmma take it: rows of at most 128 bytes, swizzled."""
    width = min(128, columns * itemsize)
    return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)  # type: ignore[abstract]


class Plan(NamedTuple):
    """How a product is cut."""

    block_rows: int  # 64: the two warpgroups share the columns; 128 or 256: the rows
    tile_n: int
    num_parts: int  # of the sum over D
    num_stages: int
    is_rounded: bool  # x is FP8 before the kernel
    is_paired: bool = False  # two blocks with neighbouring tiles of columns fetch half of x each, for both


def num_buffers(block_rows: int) -> int:
    """Of what leaves, for each warpgroup: one where a second would cost a stage."""
    return 1 if block_rows == 256 else 2


@functools.cache
def plan(M: int, D: int, N: int, block_n: int, block_d: int) -> Plan:
    """The cut with the least estimated time.

    Args:
      block_n, block_d: the rows and columns of w that share a scale.
    Raises:
      NotImplementedError: there is none.
    """
    if block_d not in (64, 128) or block_n % 64:
        raise NotImplementedError(f"scales of {block_n} x {block_d} weights")
    is_rounded = M > MAX_ROUNDED_ROWS
    best: tuple[float, Plan | None] = (math.inf, None)
    heights = (64,) if M <= 64 else (128,) if M <= 128 else (256, 128)
    for block_rows, tile_n in itertools.product(heights, (64, 128, 256)):
        if N % tile_n or block_rows * tile_n > 256 * 128:  # the accumulators' registers
            continue
        came = 0 if is_rounded else 2 * block_d * -(-M // 8) * 8
        stage = block_rows * block_d + came + tile_n * block_d + max(1024, block_rows * 4)
        num_stages = min(8, (SMEM_BYTES - 2 * num_buffers(block_rows) * PIECE * LEAVING_BYTES) // stage)
        for num_parts in range(1, min(9, D // block_d + 1)):
            cut = Plan(block_rows, tile_n, num_parts, num_stages, is_rounded)
            time = _microseconds(M, D, N, block_d, cut)
            if time < best[0]:
                best = time, cut
    if best[1] is None:
        raise NotImplementedError(f"a product with {N} columns")
    return best[1]


def _microseconds(M: int, D: int, N: int, block_d: int, cut: Plan) -> float:
    rows = cut.block_rows if cut.is_rounded else -(-M // 8) * 8
    row_blocks = -(-M // cut.block_rows)
    rounds = -(-N // cut.tile_n * cut.num_parts * row_blocks // NUM_SMS)
    steps = rounds * -(-(D // block_d) // cut.num_parts)
    from_memory = block_d * cut.tile_n / (3.0e6 / NUM_SMS) / row_blocks  # of one step, at an SM's share of 3.0 TB/s
    from_cache = block_d * (cut.tile_n + rows * (1 if cut.is_rounded else 2)) / (5.5e6 / NUM_SMS)
    multiply = 2 * cut.block_rows * cut.tile_n * block_d / (1100e6 / NUM_SMS)
    latency = 0.25 if cut.is_rounded else 0.5 + 0.006 * rows  # of a product that waits for itself, and of rounding
    results = M * N * (2 * 4 * cut.num_parts if cut.num_parts > 1 else 2) / 2e6  # written and read, from the cache
    return steps * max(from_memory, from_cache, multiply, latency) + rounds * 1.0 + results


def fp8_matmul_mosaic(
    x: jax.Array, w: jax.Array, scale: jax.Array, *, interpret: bool, cut: Plan | None = None
) -> jax.Array:
    (M, D), N = x.shape, w.shape[0]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes rows of bfloat16 or float16, not {x.dtype}")
    cut = cut or plan(M, D, N, N // scale.shape[0], D // scale.shape[1])
    # Rows come and go in boxes of whole 8-row tiles. What pads them is fused into what computed x.
    box = cut.block_rows if cut.is_rounded or M > 64 else 8
    x = jnp.pad(x, ((0, -M % box), (0, 0)))
    inputs = quantize_rows_mosaic(x, D // scale.shape[1], interpret=interpret) if cut.is_rounded else (x,)
    return _product(w, scale, *inputs, cut=cut, dtype=x.dtype, interpret=interpret)[:, :M]


def rounded(x_smem) -> tuple[jax.Array, jax.Array]:
    """A tile [rows, columns] in e4m3 and the scales [rows]."""
    values = plgpu.load(x_smem, layout=strips(x_smem.shape[1])).astype(jnp.float32)
    amax = jnp.maximum(jnp.max(jnp.abs(values), axis=1), SMALLEST_AMAX)
    return (values * lax.broadcast_in_dim(LARGEST / amax, values.shape, [0])).astype(E4M3), amax * (1 / LARGEST)


@functools.partial(jax.jit, static_argnames=("group", "interpret"))
def quantize_rows_mosaic(x: jax.Array, group: int, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """`reference.quantize_rows` of a multiple of 64 rows, in one kernel: XLA makes three."""
    M, D = x.shape

    def quantize_rows_kernel(x_ref, q_ref, scale_ref, x_smem, q_smem, scale_smem, came):
        row, column = lax.axis_index("row"), lax.axis_index("column")
        tile = pl.ds(pl.multiple_of(row * PIECE, PIECE), PIECE), pl.ds(pl.multiple_of(column * group, group), group)
        plgpu.copy_gmem_to_smem(x_ref.at[tile], x_smem, came)
        plgpu.barrier_wait(came)
        q_smem[...], scale_smem[...] = rounded(x_smem)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, q_ref.at[tile])
        plgpu.copy_smem_to_gmem(scale_smem, scale_ref.at[column, tile[0]])
        plgpu.wait_smem_to_gmem(0)

    q, scale = plgpu.kernel(
        quantize_rows_kernel,
        out_type=[jax.ShapeDtypeStruct((M, D), E4M3), jax.ShapeDtypeStruct((D // group, M), jnp.float32)],
        scratch_types=[
            plgpu.SMEM((PIECE, group), x.dtype, transforms=tiled(group, 2)),
            plgpu.SMEM((PIECE, group), E4M3, transforms=tiled(group, 1)),
            plgpu.SMEM((PIECE,), jnp.float32),
            plgpu.Barrier(),
        ],
        grid=(M // PIECE, D // group),
        grid_names=("row", "column"),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x)
    return q, scale


@functools.partial(jax.jit, static_argnames=("cut", "dtype", "interpret"))  # one trace and one kernel for all layers
def _product(w, scale, x, *row_scales, cut: Plan, dtype, interpret: bool) -> jax.Array:
    """[num_parts, rows of x, N]."""
    (num_rows, D), N = x.shape, w.shape[0]
    block_rows, tile_n, num_parts, num_stages, is_rounded, is_paired = cut
    block_n, block_d = N // scale.shape[0], D // scale.shape[1]
    out_dtype = dtype if num_parts == 1 else jnp.dtype(jnp.float32)
    box_rows = min(num_rows, block_rows)
    own_rows, own_columns = (64, tile_n // 2) if block_rows == 64 else (block_rows // 2, tile_n)  # of a warpgroup
    piece_n = min(own_columns, block_n, 64 if own_rows * own_columns == 128 * 128 else 128)  # for the registers' sake
    pieces = [(row, column) for row in range(0, own_rows, PIECE) for column in range(0, own_columns, piece_n)]
    leaving = min(piece_n, LEAVING_BYTES // out_dtype.itemsize)
    buffers = num_buffers(block_rows)
    row_blocks = num_rows // box_rows
    in_cluster = 2 if is_paired else 1
    num_units = row_blocks * (N // tile_n // in_cluster) * num_parts  # for a cluster of blocks
    num_blocks = min(NUM_SMS // in_cluster, num_units)
    steps = D // block_d
    num_threads = 3 if is_rounded else 4

    def fp8_matmul_kernel(w_ref, scale_ref, x_ref, *refs):
        refs = list(refs)
        row_scale_ref = refs.pop(0) if is_rounded else None
        out_ref, x_smem, w_smem, row_scale_smem, out_smem, full, empty, *came = refs
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        pair = lax.axis_index("pair") if is_paired else 0

        def for_each_unit(handle):
            """Calls `handle(steps so far, part, first row, first column, first step, number of steps)`; all steps."""

            def body(turn, done):
                unit, part, first, count = block + turn * num_blocks, 0, jnp.int32(0), jnp.int32(steps)
                if num_parts > 1:
                    part = lax.rem(unit, jnp.int32(num_parts))
                    unit = lax.div(unit, jnp.int32(num_parts))
                    first = lax.div(part * steps, jnp.int32(num_parts))
                    count = lax.div((part + 1) * steps, jnp.int32(num_parts)) - first
                row = pl.multiple_of(lax.rem(unit, jnp.int32(row_blocks)) * box_rows, box_rows)
                column = lax.div(unit, jnp.int32(row_blocks)) * in_cluster + pair
                column = pl.multiple_of(column * tile_n, tile_n)
                handle(done, part, row, column, first, count)
                return done + count

            turns = lax.div(num_units - 1 - block, jnp.int32(num_blocks)) + 1
            return lax.fori_loop(0, turns, body, jnp.int32(0))

        def slot_of(step):
            return lax.rem(step, jnp.int32(num_stages))

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(240 if is_rounded else 168, action="increase")
            row0 = 0 if block_rows == 64 else pl.multiple_of(warpgroup * own_rows, own_rows)
            column0 = pl.multiple_of(warpgroup * own_columns, own_columns) if block_rows == 64 else 0

            def product(slot, row, column):
                """Of one piece and one block of D."""
                x_tile = x_smem.at[slot, pl.ds(row0 + row, PIECE)]
                w_tile = w_smem.at[slot, pl.ds(column0 + column, piece_n)]
                if interpret:
                    return jnp.dot(x_tile[...].astype(jnp.float32), w_tile[...].astype(jnp.float32).T)

                def run(acc):
                    plgpu.wgmma(acc, x_tile, w_tile.transpose((1, 0)))
                    return acc[...]

                return pl.run_scoped(run, plgpu.ACC((PIECE, piece_n), jnp.float32))

            def handle(done, part, row, column, first, count):
                def step(i, sums):
                    slot = slot_of(done + i)
                    # Asked for before the wait, there after it.
                    scales_of = lambda j: scale_ref[lax.div(column + column0, jnp.int32(block_n)) + j, first + i]
                    column_scales = [scales_of(j) for j in range(-(-own_columns // block_n))]
                    plgpu.barrier_wait(full.at[slot])
                    new_sums = []
                    for index, ((r, c), total) in enumerate(zip(pieces, sums, strict=True)):
                        rows = row_scale_smem.at[slot, pl.ds(row0 + r, PIECE)]
                        row_scale = plgpu.load(rows, layout=ROWS) * column_scales[c // block_n]
                        values = product(slot, r, c)
                        if index == len(pieces) - 1:
                            plgpu.barrier_arrive(empty.at[slot])
                        new_sums.append(total + values * lax.broadcast_in_dim(row_scale, values.shape, [0]))
                    return tuple(new_sums)

                zeros = plgpu.layout_cast(jnp.full((PIECE, piece_n), 0, jnp.float32), MATRIX)
                sums = lax.fori_loop(0, count, step, (zeros,) * len(pieces))
                buffer = 0
                for (r, c), total in zip(pieces, sums, strict=True):
                    out, count_rows = total.astype(out_dtype), min(PIECE, num_rows)
                    for n in range(0, piece_n, leaving):
                        plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)  # the copy that left this buffer
                        out_smem[warpgroup, buffer] = out[:, n : n + leaving]
                        plgpu.commit_smem()
                        rows = pl.ds(row + row0 + r, count_rows)
                        target = out_ref.at[part, rows, pl.ds(column + column0 + c + n, leaving)]
                        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, buffer, pl.ds(0, count_rows)], target)
                        buffer = (buffer + 1) % buffers

            for_each_unit(handle)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == num_threads - 1)
        def _fetch():
            plgpu.set_max_registers(24 if is_rounded else 40, action="decrease")

            def handle(done, part, row, column, first, count):
                del part

                def step(i, _):
                    slot = slot_of(done + i)
                    pl.when(done + i >= num_stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    deep = pl.ds(pl.multiple_of((first + i) * block_d, block_d), block_d)
                    plgpu.copy_gmem_to_smem(w_ref.at[pl.ds(column, tile_n), deep], w_smem.at[slot], full.at[slot])
                    rows, box = pl.ds(row, box_rows), pl.ds(0, box_rows)
                    if is_rounded:
                        shared = "pair" if is_paired else None
                        tile = x_smem.at[slot, box]
                        plgpu.copy_gmem_to_smem(x_ref.at[rows, deep], tile, full.at[slot], collective_axes=shared)
                        scales = row_scale_ref.at[first + i, rows]
                        plgpu.copy_gmem_to_smem(scales, row_scale_smem.at[slot, box], full.at[slot])
                    else:
                        plgpu.copy_gmem_to_smem(x_ref.at[rows, deep], came[0].at[slot], came[1].at[slot])

                lax.fori_loop(0, count, step, None)

            done = for_each_unit(handle)
            # No block ends before its barriers are all waited for.
            wait = lambda i, _: plgpu.barrier_wait(empty.at[slot_of(i)])
            lax.fori_loop(jnp.maximum(done - num_stages, 0), done, wait, None)

        if not is_rounded:

            @pl.when(warpgroup == 2)
            def _round():
                def handle(done, part, row, column, first, count):
                    del part, row, column, first

                    def step(i, _):
                        slot = slot_of(done + i)
                        plgpu.barrier_wait(came[1].at[slot])  # so the slot's last products are done as well
                        x_smem[slot, :box_rows], row_scale_smem[slot, :box_rows] = rounded(came[0].at[slot])
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(full.at[slot])

                    lax.fori_loop(0, count, step, None)

                for_each_unit(handle)

    # A slot of a pair is free where both blocks have read it.
    emptied = functools.partial(plgpu.ClusterBarrier, collective_axes=("pair",)) if is_paired else plgpu.Barrier
    arrivals = 3 if is_rounded else 2  # x, w and scales; w and the warpgroup that rounds
    came: list[Any] = [
        plgpu.SMEM((num_stages, box_rows, block_d), dtype, transforms=tiled(block_d, 2)),
        plgpu.Barrier(num_barriers=num_stages),
    ]
    return plgpu.kernel(
        fp8_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((num_parts, num_rows, N), out_dtype),
        scratch_types=[
            plgpu.SMEM((num_stages, block_rows, block_d), E4M3, transforms=tiled(block_d, 1)),
            plgpu.SMEM((num_stages, tile_n, block_d), E4M3, transforms=tiled(block_d, 1)),
            plgpu.SMEM((num_stages, block_rows), jnp.float32),
            plgpu.SMEM((2, buffers, PIECE, leaving), out_dtype, transforms=tiled(leaving, out_dtype.itemsize)),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=num_stages),
            emptied(num_arrivals=2, num_barriers=num_stages),
            *([] if is_rounded else came),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        cluster=(2,) if is_paired else (),
        cluster_names=("pair",) if is_paired else (),
        num_threads=num_threads,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(w, scale, x, *row_scales)

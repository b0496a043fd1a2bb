"""The product on Hopper for up to 256 rows: a persistent grid of (column tile, part of the sum) units.

One warpgroup fetches tiles of x and w with TMA, the others multiply. Where there are too few column tiles to fill the
GPU, the sum over D is cut into parts; whoever needs the result adds them up, which costs no kernel of its own, or the
parts' blocks do, through each other's shared memory. Every block needs x, which by 128 rows is as much traffic from the
L2 cache as the weights: neighbours in a cluster can fetch it once for all of them.
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
# Cuts with sharers or joined parts and gated products were compiled for an H100 and, but for the joined, interpreted.
# None has run on a GPU yet: until they have, CUTS and GATED_CUTS serve nobody.
IS_CHECKED_ON_GPU = False
SMALL_WEIGHT_BYTES = 16 * 2**20  # such as all of 0.6B's
TILE_D = 64  # what one 128-byte swizzle holds
SMEM_BYTES = 227 * 1024 - 2048  # a block's most, less the barriers
EPILOGUE = (64, 64)  # the piece of a result that leaves through shared memory at once
WARPGROUPS = {64: 1, 128: 2, 192: 3, 256: 2}  # that multiply a tile of so many rows
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


class Plan(NamedTuple):
    """How a product is cut."""

    block_rows: int  # rows of a tile, a multiple of 64
    num_warpgroups: int  # that multiply
    tile_n: int  # columns of the weights; of a gated product half of them gate, half of them up
    num_parts: int  # of the sum over D
    num_stages: int
    sharers: int = 1  # blocks next to each other, a cluster, for which x is fetched once
    is_joined: bool = False  # the parts of a tile are a cluster that adds them up


# Those chosen by hand, for (rows of a tile, D, columns of w): (tile_n, num_parts, sharers, is_joined).
CUTS: dict[tuple[int, int, int], tuple[int, int, int, bool]] = {
    # Qwen3-8B: qkv, o, gate_up and down
    (128, 4096, 6144): (192, 4, 2, True),
    (128, 4096, 4096): (128, 4, 2, True),
    (128, 4096, 24576): (192, 1, 2, False),
    (128, 12288, 4096): (128, 4, 2, True),
    (192, 4096, 6144): (192, 4, 2, True),
    (192, 4096, 4096): (128, 4, 2, True),
    (192, 4096, 24576): (192, 1, 2, False),
    (192, 12288, 4096): (128, 4, 2, True),
    (256, 4096, 6144): (192, 4, 2, True),
    (256, 4096, 4096): (128, 4, 2, True),
    (256, 4096, 24576): (192, 1, 2, False),
    (256, 12288, 4096): (128, 4, 2, True),
}
# The same of products that are gated: a block has tile_n / 2 columns of gate and as many of up.
GATED_CUTS: dict[tuple[int, int, int], tuple[int, int, int, bool]] = {
    (64, 4096, 24576): (256, 1, 1, False),
    (128, 4096, 24576): (256, 1, 2, False),
}


@functools.cache
def plan(M: int, D: int, N: int, out_bytes: int, is_gated: bool = False) -> Plan:
    """The cut from the tables, or else the one with the least estimated time.

    Raises:
      NotImplementedError: there is none.
    """
    block_rows = max(64, -(-M // 64) * 64)
    chosen = (GATED_CUTS if is_gated else CUTS).get((block_rows, D, N)) if IS_CHECKED_ON_GPU else None
    if chosen:
        return with_stages(block_rows, *chosen, is_gated=is_gated)
    # Where this was measured to be quicker than what XLA picks.
    is_best = M <= MAX_ROWS if D * N * 2 <= SMALL_WEIGHT_BYTES else 8 < M <= 128
    if is_gated or not is_best or D % TILE_D:
        raise NotImplementedError(f"a product of {M} rows over {D} columns, gated: {is_gated}")
    best: tuple[float, Plan | None] = (math.inf, None)
    for tile_n in (64, 128, 192, 256):
        num_warpgroups = WARPGROUPS[block_rows]
        accumulators = block_rows // num_warpgroups * tile_n // 128  # registers of each thread
        if N % tile_n or accumulators > (96 if num_warpgroups == 3 else 192):
            continue
        for num_parts in range(1, min(9, D // TILE_D + 1)):
            time = _microseconds(M, D, N, block_rows, tile_n, num_parts, out_bytes)
            if time < best[0]:
                best = time, with_stages(block_rows, tile_n, num_parts)
    if best[1] is None:
        raise NotImplementedError(f"a product with {N} columns")
    return best[1]


def with_stages(
    block_rows: int, tile_n: int, num_parts: int, sharers: int = 1, is_joined: bool = False, *, is_gated: bool = False
) -> Plan:
    """The cut with as many stages as fit into a block's shared memory."""
    num_warpgroups = WARPGROUPS[block_rows]
    is_wide = num_parts > 1 and not is_joined  # results in float32
    columns = tile_n // (1 + is_gated) // num_parts if is_joined else EPILOGUE[1]
    staging = num_warpgroups * EPILOGUE[0] * columns * (4 if is_wide else 2)
    num_stages = min(8, (SMEM_BYTES - staging) // ((block_rows + tile_n) * TILE_D * 2))
    return Plan(block_rows, num_warpgroups, tile_n, num_parts, num_stages, sharers, is_joined)


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
    if cut is None:
        try:
            cut = plan(M, D, N, x.dtype.itemsize, is_gated)
        except NotImplementedError:
            if not is_gated:
                raise
            return swiglu(sum_parts(small_matmul_mosaic(x, w, interpret=interpret), x.dtype))[None]
    if interpret and cut.is_joined:
        raise NotImplementedError("the interpreter cannot store into another block's shared memory")
    whole = 8 * cut.sharers  # rows come and go in boxes of whole 8-row tiles
    num_rows = -(-M // whole) * whole if M <= 64 else cut.block_rows
    x = jnp.pad(x, ((0, num_rows - M), (0, 0)))  # fused into whatever computed x
    return _product(x, w, cut=cut, is_gated=is_gated, interpret=interpret)[:, :M]


@functools.partial(jax.jit, static_argnames=("cut", "is_gated", "interpret"))  # one trace and kernel for all layers
def _product(x, w, *, cut: Plan, is_gated: bool, interpret: bool) -> jax.Array:
    """[num_parts, rows of x, N]; joined: [1, rows of x, N]; N is half the columns of w where `is_gated`."""
    block_rows, num_warpgroups, tile_n, num_parts, num_stages, sharers, is_joined = cut
    (num_rows, D), sides = x.shape, 1 + is_gated
    N, tile_n = w.shape[1] // sides, tile_n // sides
    num_results = 1 if is_joined else num_parts
    if (is_gated and num_results > 1) or N % (tile_n * sharers):
        raise NotImplementedError(f"{N} columns, gated: {is_gated}, cut as {cut}")
    dtype = x.dtype if num_results == 1 else jnp.dtype(jnp.float32)
    rows = block_rows // num_warpgroups  # of one warpgroup
    num_units = N // tile_n // sharers * num_results  # of a cluster
    num_clusters = min(NUM_SMS // (sharers * num_parts // num_results), num_units)
    steps = D // TILE_D
    piece = (EPILOGUE[0], tile_n // num_parts if is_joined else EPILOGUE[1])
    if is_joined and (num_units > num_clusters or piece[1] % 16):
        raise NotImplementedError(f"{N} columns joined in one turn, cut as {cut}")

    def small_matmul_kernel(x_ref, w_ref, out_ref, buffers, out_smem, full, empty, *joining):
        (x_smem, w_smem), *received = buffers if is_joined else (buffers,)
        cluster, warpgroup = lax.axis_index("cluster"), lax.axis_index("warpgroup")
        sharer = lax.axis_index("sharer") if sharers > 1 else 0
        own_part = lax.axis_index("part") if is_joined else None

        def for_each_unit(handle):
            """Calls `handle(steps so far, part, first column, first step, number of steps)`; all steps."""

            def body(turn, done):
                unit = cluster + turn * num_clusters
                part = own_part if is_joined else lax.rem(unit, jnp.int32(num_parts))
                tile = lax.div(unit, jnp.int32(num_results)) * sharers + sharer
                column = pl.multiple_of(tile * tile_n, tile_n)
                first = lax.div(part * steps, jnp.int32(num_parts))
                count = lax.div((part + 1) * steps, jnp.int32(num_parts)) - first
                handle(done, part, column, first, count)
                return done + count

            turns = lax.div(num_units - 1 - cluster, jnp.int32(num_clusters)) + 1
            return lax.fori_loop(0, turns, body, jnp.int32(0))

        def join(sums):
            """Each block of a cluster gets its share of the columns from all of them, and adds them up in order."""
            (parts_smem,), (is_idle, has_arrived) = received, joining
            plgpu.barrier_arrive(is_idle)  # the tiles of x and w, whose memory it is, have all been read
            plgpu.barrier_wait(is_idle)
            for target in range(num_parts):
                for side, acc in enumerate(sums):
                    plgpu.async_store_smem(
                        acc[:, target * piece[1] : (target + 1) * piece[1]],
                        parts_smem.at[own_part, side, warpgroup],
                        has_arrived.at[warpgroup],
                        cluster_idx=target,
                        cluster_dim="part",
                    )
            plgpu.barrier_wait(has_arrived.at[warpgroup])
            load = lambda part, side: plgpu.load(parts_smem.at[part, side, warpgroup], layout=plgpu.Layout.WGMMA)
            return [sum((load(part, side) for part in range(1, num_parts)), load(0, side)) for side in range(sides)]

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
                if is_joined:
                    sums, part, column = join(sums), 0, column + own_part * piece[1]
                result = sums[0]
                if is_gated:
                    result = result / (1 + jnp.exp(-result)) * sums[1]
                result = result.astype(dtype)
                for row in range(0, rows, piece[0]):
                    count_rows = min(piece[0], num_rows)
                    for n in range(0, result.shape[1], piece[1]):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out_smem[warpgroup] = result[row : row + piece[0], n : n + piece[1]]
                        plgpu.commit_smem()
                        target = out_ref.at[
                            part, pl.ds(warpgroup * rows + row, count_rows), pl.ds(column + n, piece[1])
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
                    shared = "sharer" if sharers > 1 else None  # each of them fetches a part, for all
                    plgpu.copy_gmem_to_smem(x_ref.at[:, deep], x_rows, full.at[slot], collective_axes=shared)

                lax.fori_loop(0, count, step, None)

            done = for_each_unit(handle)
            # No block ends before all have let go of its barriers.
            wait = lambda i, _: plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(num_stages))])
            lax.fori_loop(jnp.maximum(done - num_stages, 0), done, wait, None)

    buffers = (
        plgpu.SMEM((num_stages, block_rows, TILE_D), x.dtype, transforms=TILED),
        plgpu.SMEM((num_stages, sides, TILE_D, tile_n), w.dtype, transforms=TILED),
    )
    across = lambda axis, **options: plgpu.ClusterBarrier(collective_axes=(axis,), **options)
    empty = {"num_arrivals": num_warpgroups, "num_barriers": num_stages}
    joining = []
    if is_joined:
        wide = 32 if piece[1] % 32 == 0 else 16
        tiled = (plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(4 * wide))  # type: ignore[abstract]
        shape = (num_parts, sides, num_warpgroups, rows, piece[1])
        buffers = plgpu.RefUnion(buffers, plgpu.SMEM(shape, jnp.float32, transforms=tiled))
        joining.append(across("part", num_arrivals=num_warpgroups))
        joining.append(plgpu.Barrier(num_arrivals=num_parts * sides, num_barriers=num_warpgroups))
    cluster = {"sharer": sharers} if sharers > 1 else {}
    cluster |= {"part": num_parts} if is_joined else {}
    return plgpu.kernel(
        small_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((num_results, num_rows, N), dtype),
        scratch_types=[
            buffers,
            plgpu.SMEM((num_warpgroups, *piece), dtype),
            plgpu.Barrier(num_arrivals=1 + sides, num_barriers=num_stages),
            across("sharer", **empty) if sharers > 1 else plgpu.Barrier(**empty),
            *joining,
        ],
        grid=(num_clusters,),
        grid_names=("cluster",),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, w)

"""Routing on Hopper: one warpgroup chooses, counts and sorts, 64 tokens at a time.

Choosing is k times the largest of a row. Sorting is counting: where tokens are rows and experts columns, an expert's
number of tokens, a token's rank among them and an expert's first tile are products with matrices of zeros and ones,
which the tensor cores do exactly.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a wgmma
MAX_TOKENS = 256
MATRIX = plgpu.Layout.WGMMA
VECTOR = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of a MATRIX
TILED = {  # shared memory of 128-byte lines, by the size of an element
    itemsize: (plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    for itemsize in (2, 4)
}


def route_mosaic(
    logits: jax.Array, is_token: jax.Array, *, k: int, tile: int, num_tiles: int, is_normalized: bool, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(position int32 [k, T], weights float32 [k, T], work int32 [1 + num_tiles])."""
    T, E = logits.shape
    if E not in (64, 128) or T > MAX_TOKENS or T % 8 or k > 16:
        raise NotImplementedError(f"routing {T} tokens to {k} of {E} experts")
    padded = -(-T // ROWS) * ROWS
    is_token = jnp.pad(is_token.astype(jnp.int32), (0, padded - T))
    # Blocks of 64 begin in the arrays and may end beyond: TMA fills with zeros, and leaves out.
    num_rows, num_entries = (padded, -(-(1 + num_tiles) // ROWS) * ROWS) if interpret else (T, 1 + num_tiles)
    logits = jnp.pad(logits, ((0, num_rows - T), (0, 0)))
    options = {"k": k, "tile": tile, "num_tiles": num_tiles, "is_normalized": is_normalized}
    position, weights, work = _route(logits, is_token, num_entries=num_entries, interpret=interpret, **options)
    return position[:, :T], weights[:, :T], work[: 1 + num_tiles]


@functools.partial(jax.jit, static_argnames=("k", "tile", "num_tiles", "is_normalized", "num_entries", "interpret"))
def _route(
    logits, is_token, *, k: int, tile: int, num_tiles: int, is_normalized: bool, num_entries: int, interpret: bool
):
    (T, E), blocks = logits.shape, is_token.shape[0] // ROWS
    work_blocks = -(-num_entries // ROWS)
    f32, bf16 = jnp.float32, jnp.bfloat16

    def route_kernel(logits_ref, is_token_ref, position_ref, weights_ref, work_ref, logits_smem, chosen_smem,
                     before_smem, is_token_smem, position_smem, weights_smem, work_smem, came):  # fmt: skip
        iota = lambda shape, axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)
        along = lambda vector: lax.broadcast_in_dim(vector, (ROWS, E), [0])
        rows_of = lambda block: pl.ds(block * ROWS, ROWS)
        start = pl.multiple_of(lax.axis_index("block") * ROWS, ROWS)  # 0, but not for who looks at ends

        def product(left, right_ref):
            """left [64, n] in registers times a matrix [n, E] in shared memory."""
            left = left.astype(bf16)
            if interpret:
                return jnp.dot(left, right_ref[...], preferred_element_type=f32)

            def run(acc):
                plgpu.wgmma(acc, left, right_ref)
                return acc[...]

            return pl.run_scoped(run, plgpu.ACC((ROWS, E), f32))

        for block in range(blocks):
            plgpu.copy_gmem_to_smem(logits_ref.at[pl.ds(start + block * ROWS, ROWS)], logits_smem.at[block], came)
        plgpu.copy_gmem_to_smem(is_token_ref, is_token_smem, came)
        plgpu.barrier_wait(came)

        expert = iota((ROWS, E), 1).astype(f32)
        for block in range(blocks):
            values = plgpu.load(logits_smem.at[block], layout=MATRIX)
            values = jnp.exp(values - along(jnp.max(values, axis=1)))
            values = values / along(jnp.sum(values, axis=1))
            is_kept = plgpu.load(is_token_smem.at[rows_of(block)], layout=VECTOR).astype(f32)
            best = []
            for j in range(k):
                largest = jnp.max(values, axis=1)
                # Of equal ones the first; of a row of NaN, none.
                first = -jnp.max(jnp.where(values == along(largest), -expert, -f32(E)), axis=1)
                is_it = expert == along(first)
                best.append(largest)
                values = jnp.where(is_it, -f32(1), values)  # below all that are left
                position_smem[block, j] = first.astype(jnp.int32)  # until the place is known
            total = functools.reduce(lambda a, b: a + b, best)
            for j, largest in enumerate(best):
                weights_smem[block, j] = largest / total if is_normalized else largest
            is_chosen = jnp.where(values < 0, f32(1), f32(0))
            chosen_smem[block] = (is_chosen * along(is_kept)).astype(bf16)
        for half in range(E // ROWS):
            is_before = iota((ROWS, E), 0) + half * ROWS < iota((ROWS, E), 1)
            before_smem[rows_of(half)] = jnp.where(is_before, f32(1), f32(0)).astype(bf16)
        plgpu.commit_smem()

        ones = plgpu.layout_cast(jnp.full((ROWS, ROWS), 1, f32), MATRIX)
        is_earlier = jnp.where(iota((ROWS, ROWS), 1) < iota((ROWS, ROWS), 0), f32(1), f32(0))
        count = lambda block: product(ones, chosen_smem.at[block])  # of each expert, in every row
        total = functools.reduce(lambda a, b: a + b, [count(block) for block in range(blocks)])
        tiles = ((total.astype(jnp.int32) + (tile - 1)) // tile).astype(f32)
        first_tile = product(tiles, before_smem)
        end = first_tile + tiles
        for block in range(work_blocks):
            index = (iota((ROWS, E), 0) + (block * ROWS - 1)).astype(f32)  # of the list's entries; -1: its length
            is_over = jnp.where(end <= index, f32(1), f32(0))
            entry = jnp.minimum(jnp.sum(is_over, axis=1), f32(E - 1))
            entry = jnp.where(jnp.max(index, axis=1) < 0, jnp.max(end, axis=1), entry)
            work_smem[rows_of(block)] = entry.astype(jnp.int32)

        base = first_tile * tile
        for block in range(blocks):
            place = base + product(is_earlier, chosen_smem.at[block])
            is_kept = plgpu.load(is_token_smem.at[rows_of(block)], layout=VECTOR)
            for j in range(k):
                own = plgpu.load(position_smem.at[block, j], layout=VECTOR).astype(f32)
                found = jnp.sum(jnp.where(expert == along(own), place, f32(0)), axis=1).astype(jnp.int32)
                is_there = (is_kept > 0) & (own < f32(E))
                position_smem[block, j] = jnp.where(is_there, found, num_tiles * tile)
            if block < blocks - 1:
                base = base + count(block)
        plgpu.commit_smem()
        for block in range(blocks):
            to = pl.ds(start + block * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(position_smem.at[block], position_ref.at[:, to])
            plgpu.copy_smem_to_gmem(weights_smem.at[block], weights_ref.at[:, to])
        for block in range(work_blocks):
            plgpu.copy_smem_to_gmem(work_smem.at[rows_of(block)], work_ref.at[pl.ds(start + block * ROWS, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        route_kernel,
        out_type=[
            jax.ShapeDtypeStruct((k, T), jnp.int32),
            jax.ShapeDtypeStruct((k, T), f32),
            jax.ShapeDtypeStruct((num_entries,), jnp.int32),
        ],
        scratch_types=[
            plgpu.SMEM((blocks, ROWS, E), f32, transforms=TILED[4]),
            plgpu.SMEM((blocks, ROWS, E), bf16, transforms=TILED[2]),
            plgpu.SMEM((E, E), bf16, transforms=TILED[2]),
            plgpu.SMEM((blocks * ROWS,), jnp.int32),
            plgpu.SMEM((blocks, k, ROWS), jnp.int32),
            plgpu.SMEM((blocks, k, ROWS), f32),
            plgpu.SMEM((work_blocks * ROWS,), jnp.int32),
            plgpu.Barrier(num_arrivals=blocks + 1),
        ],
        grid=(1,),
        grid_names=("block",),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(logits, is_token)

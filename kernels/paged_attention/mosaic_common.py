"""What the decode and the prefill kernel share: layouts, the page walk, and the two matrix products."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.elementwise import E4M3, from_bits

LOG2E = math.log2(math.e)
MASKED = -1e30
NUM_SMS = 132  # of an H100 or H200; only a guide for how to cut the work
# What wgmma reads, for 2-byte types. (jax's classes have a method without a body, which mypy takes for abstract.)
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
MATRIX = plgpu.Layout.WGMMA
# Few rows of a matrix on their way through registers: as a MATRIX, but the warps side by side.
STRIP = plgpu.Layout.TILED(
    Tiling(((16, 32), (16, 8), (8, 8), (2,))), warp_dims=(-6,), lane_dims=(-3, -2), vector_dim=-1
)
STRIP_ROWS = 32
ROWS_AT_ONCE = 16  # a tile that is not full is fetched in multiples of these
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of a MATRIX
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def check_supported(q: jax.Array, kv: jax.Array, max_group: int) -> None:
    N, H = q.shape[1:]
    K, S = kv.shape[3:5]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel computes in bfloat16 or float16, not {q.dtype}")
    if kv.dtype != q.dtype and (kv.dtype, q.dtype) != (jnp.uint8, jnp.float16):
        raise NotImplementedError(f"queries of {q.dtype} for a cache of {kv.dtype}")
    is_group_too_large = max_group < N // K
    if H not in (64, 128) or S not in (16, 32, 64, 128) or is_group_too_large:
        raise NotImplementedError(f"head_dim {H}, page size {S}, {N} query heads for {K} KV heads")


def tiled(head_dim: int, dtype) -> tuple:
    """How a tile of a cache of `dtype` lies in shared memory: rows of at most 128 bytes, swizzled."""
    if dtype != E4M3:
        return TILED
    return plgpu.TilingTransform((8, head_dim)), plgpu.SwizzleTransform(head_dim)  # type: ignore[abstract]


def flat_pages(kv: jax.Array) -> jax.Array:
    """[L, 2, P, K, S, H] -> [L * 2 * P * K, S, H]: one tile a (page, head), which TMA can address."""
    return from_bits(kv).reshape(-1, *kv.shape[4:])


def page_slices(table_ref, seq, tile, tile_tokens: int, page_size: int):
    """The pieces of pages that hold one tile of tokens: (row in the tile, page, slice of the page)."""
    width = table_ref.shape[1]
    if page_size > tile_tokens:
        tiles_per_page = jnp.int32(page_size // tile_tokens)
        start = pl.multiple_of(lax.rem(tile, tiles_per_page) * tile_tokens, tile_tokens)
        return [(0, table_ref[seq, lax.div(tile, tiles_per_page)], pl.ds(start, tile_tokens))]
    num_pages = tile_tokens // page_size
    # The last tile may reach past the table; what it reads there is masked.
    entries = [jnp.minimum(tile * num_pages + j, width - 1) for j in range(num_pages)]
    return [(j * page_size, table_ref[seq, entry], pl.ds(0, page_size)) for j, entry in enumerate(entries)]


def load_tile(
    pages_ref, smem, barrier, slices, *, plane, num_pages: int, head, num_heads: int, num_valid: jax.Array | None = None
) -> None:
    """Starts the copies of one tile of keys or values.

    Args:
      plane: 2 * layer + (0 for keys, 1 for values).
      num_valid: how many of its tokens are wanted, which spares reading the rest where the tile lies in one page.
    """
    for row, page, rows in slices:
        index = (plane * num_pages + page) * num_heads + head

        def copy(count: int, row=row, rows=rows, index=index) -> None:
            source = pages_ref.at[index, pl.ds(rows.start, count)]
            plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(row, count)], barrier)

        if num_valid is None or len(slices) > 1:
            copy(rows.size)
            continue
        for count in range(ROWS_AT_ONCE, rows.size, ROWS_AT_ONCE):
            pl.when((num_valid > count - ROWS_AT_ONCE) & (num_valid <= count))(functools.partial(copy, count))
        pl.when(num_valid > rows.size - ROWS_AT_ONCE)(functools.partial(copy, rows.size))


def num_copies(tile_tokens: int, page_size: int) -> int:
    return max(1, tile_tokens // page_size)


def load_widened(smem, dtype, layout) -> jax.Array:
    """A tile of e4m3 from shared memory to registers. Hopper makes two float16 of it with one instruction, and exactly;
    bfloat16 would take four."""
    return plgpu.load(smem, layout=layout).astype(dtype)


def zero_rows_from(v_smem, num_valid) -> None:
    """Slots that hold no token may hold NaN, and 0 * NaN in the product would spoil the sum."""
    for column in range(0, v_smem.shape[1], 64):  # in parts, for the registers' sake
        part = v_smem.at[:, pl.ds(column, 64)]
        values = plgpu.load(part, layout=MATRIX)
        rows = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=MATRIX)
        part[...] = jnp.where(rows < num_valid, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def scores_product(q, k_smem, interpret: bool, meanwhile=lambda: None) -> jax.Array:
    """q @ k.T (or k @ q.T) in float32, of q in shared memory or in registers.

    `meanwhile` runs between the start and the end of the product.
    """
    if interpret:
        meanwhile()
        return jnp.dot(q[...], k_smem[...].T, preferred_element_type=jnp.float32)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, q, k_smem.transpose((1, 0)))
        meanwhile()
        return acc_ref[...]

    return pl.run_scoped(product, plgpu.ACC((q.shape[0], k_smem.shape[0]), jnp.float32))


def add_values_product(acc: jax.Array, p: jax.Array, v_smem, interpret: bool, meanwhile=lambda: None) -> jax.Array:
    """acc + p @ v. The interpreter has no wgmma with an operand in registers."""
    if interpret:
        meanwhile()
        return acc + jnp.dot(p, v_smem[...], preferred_element_type=jnp.float32)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, p, v_smem)
        meanwhile()

    return pl.run_state(product)(plgpu.ACC.init(acc))


def add_transposed_product(acc: jax.Array, v_smem, p_smem, interpret: bool) -> jax.Array:
    """acc + (p @ v).T, of p and v in shared memory."""
    if interpret:
        return acc + jnp.dot(v_smem[...].T, p_smem[...].T, preferred_element_type=jnp.float32)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, v_smem.transpose((1, 0)), p_smem.transpose((1, 0)))

    return pl.run_state(product)(plgpu.ACC.init(acc))


def store_transposed(smem, x: jax.Array, interpret: bool) -> None:
    """smem = x.T for an x in the layout MATRIX."""
    if interpret:
        smem[...] = x.T
    else:
        smem.transpose((1, 0))[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def broadcast_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [1])


def broadcast_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])


def initial_state(num_rows: int, head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Accumulator, running maximum (in units of log 2) and running sum of the online softmax."""
    full = lambda shape, value, layout: plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
    return full((num_rows, head_dim), 0, MATRIX), full((num_rows,), MASKED, ROWS), full((num_rows,), 0, ROWS)

"""int4 words to the left operand of wgmma, inside registers: one cell, one warpgroup.

The layouts are those of `packing`: the words that a thread loads are the numbers that it has to give to wgmma, so all
it takes is a shift, a mask with the exponent that makes a pair of floats of two nibbles, and a subtraction.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT_ACC_32BIT
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.int4_matmul.packing import CELL_OUTPUTS, CELL_WORDS, GROUP, ZERO_MASK

ir = utils.ir  # MLIR's types, as Mosaic's own code sees them
WORDS = plgpu.Layout.WG_STRIDED((CELL_WORDS // 128, 128), vec_size=4)
OUTPUTS = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of a matrix
# The bits of a pair of floats whose mantissas count in ones (128 and 1024): "or" adds a nibble to one whose bits are 0.
ONES = {jnp.dtype(jnp.bfloat16): 0x43004300, jnp.dtype(jnp.float16): 0x64006400}
# lop3's table of (a & b) | c; ptxas makes two instructions of an "and" and an "or" with constants.
PAIR = """{{
    .reg .b32 pair;
    shr.u32 pair, $1, {shift};
    lop3.b32 pair, pair, 0x000F000F, {ones}, 0xEA;
    sub.{type} $0, pair, $2;
}}"""


def centred_weights(words: jax.Array, scales_zeros: jax.Array, dtype: Any) -> jax.Array:
    """q - zero [64, 128] of a cell's words (laid out as WORDS) and its outputs' `scales_zeros` words (as OUTPUTS).

    Exact: a float of `dtype` holds the sums of a whole number and 128 or 1024.
    """
    shape, ones = (CELL_OUTPUTS, GROUP), ONES[jnp.dtype(dtype)]
    template = {"ones": ones, "type": {"bfloat16": "bf16x2", "float16": "f16x2"}[jnp.dtype(dtype).name]}
    zeros = (scales_zeros & ZERO_MASK) * 0x10001 | ones

    @plgpu.inline_mgpu(
        arg_types=(WORDS, OUTPUTS), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA)
    )
    def convert(_, words, zeros):
        layout, i32 = mgpu.WGMMA_LAYOUT, ir.IntegerType.get_signless(32)
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        columns_by_rows = registers.reshape(GROUP // 8, 2)  # a view: 8 inputs, and the outputs 8 further or not
        pair_type = ir.VectorType.get((2,), utils.dtype_to_ir_type(dtype))
        as_word = lambda four, i: utils.bitcast(utils.vector_slice(four, slice(i, i + 1)), i32)
        for column in range(GROUP // 8):
            word, half = divmod(column, 2)
            four = words.registers.flat[word // 4]
            for row in range(2):
                ptx = PAIR.format(shift=4 * (2 * half + row), **template)
                zero = as_word(zeros.registers.flat[row], 0)
                pair = utils.inline_ptx(ptx, as_word(four, word % 4), zero, result_types=i32)
                columns_by_rows[column, row] = utils.bitcast(pair, pair_type)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return convert(words, zeros)


def store_transposed(ref: Any, matrix: jax.Array) -> None:
    """ref[...] = matrix.T, to shared memory: each thread the numbers that it has."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(_, ref, matrix):
        matrix = matrix.to_layout(WGMMA_LAYOUT_ACC_32BIT)  # vectors of one: neighbours are not neighbours in ref
        matrix.store_untiled(utils.memref_transpose(ref, (1, 0)), optimized=False)

    store(ref, matrix)

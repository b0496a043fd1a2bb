"""How int4 weights lie in memory, so that a thread of the kernel reads its operands of wgmma in 16-byte pieces. numpy.

A cell is 128 inputs × 64 outputs, a group of inputs and what one warpgroup multiplies at once: 1024 int32 words, 8 a
thread. Word j of a thread holds what it needs of inputs 16 j to 16 j + 15: two rows (outputs) 8 apart, of each two
neighbouring inputs and the two that are 8 further. Nibbles p and p + 4 of a word are neighbouring inputs, so a shift, a
mask and an exponent make a pair of 16-bit floats of them.
"""

import numpy as np

GROUP = 128  # inputs that share a scale and a zero point
CELL_OUTPUTS = 64
CELL_WORDS = GROUP * CELL_OUTPUTS // 8
ZERO_MASK = 31  # the bits of a `scales_zeros` word that hold the zero point, 0 to 16

# Inputs of a group are (half of the words, word of four, 8 further, lane % 4, neighbour), outputs of a cell are (warp,
# 8 further, lane // 4). The words' order, slowest first, and then the nibbles', the highest first.
SPLIT_INPUTS, SPLIT_OUTPUTS = (2, 4, 2, 4, 2), (4, 2, 8)
ORDER = (0, 6, 1, 7, 9, 4, 2, 5, 3, 8)  # of [groups, *SPLIT_INPUTS, cells, *SPLIT_OUTPUTS]


def pack_weights(q: np.ndarray) -> np.ndarray:
    """uint8 [D, N] in 0..15 → int32 [D / 128, N / 64, 1024]."""
    groups, cells = q.shape[0] // GROUP, q.shape[1] // CELL_OUTPUTS
    eights = np.ascontiguousarray(q).view(np.uint64).reshape(groups, *SPLIT_INPUTS, cells * 4, 2)
    pairs = (eights[..., 1] << np.uint64(4) | eights[..., 0]).view(np.uint8)  # of outputs 8 apart, a byte each
    words = np.zeros((groups, 2, 4, 4, cells * 4 * 8), np.uint32)
    for byte, (neighbour, further) in enumerate(np.ndindex(2, 2)):
        words |= pairs[:, :, :, further, :, neighbour].astype(np.uint32) << np.uint32(8 * byte)
    words = words.reshape(groups, 2, 4, 4, cells, 4, 8)
    return np.ascontiguousarray(words.transpose(0, 4, 1, 5, 6, 3, 2)).view(np.int32).reshape(groups, cells, CELL_WORDS)


def pack_scales(scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Both [D / 128, N] → int32 [D / 128, N]: the bits of the scale in float32, in its lowest five the zero point.

    Scales of float16 or bfloat16 keep their value: those bits are 0 in them.
    """
    bits = np.ascontiguousarray(scales.astype(np.float32)).view(np.int32)
    return (bits & ~np.int32(ZERO_MASK)) | zeros.astype(np.int32)

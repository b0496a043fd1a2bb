"""FP8 by transformers' own conversion (scripts/make_fp8_golden.py): what it makes of a weight, and takes that for.

For AWQ transformers calls gptqmodel's kernels, so there is nothing of its own to compare with; the formulas of
`tests/quantization/checkpoints.py`, loops of numpy, stand for it.
"""

from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax.kernels.fp8_matmul.reference import dequantize
from qjax.quantization.writing import tensors_of

GOLDEN = np.load(Path(__file__).parents[1] / "golden/fp8.npz")
WEIGHT, NUMBERS = GOLDEN["weight"].view(ml_dtypes.bfloat16), GOLDEN["numbers"].view(ml_dtypes.bfloat16)
QUANTISED = GOLDEN["quantised"].view(ml_dtypes.float8_e4m3fn)


def test_transformers_fp8_is_read_bit_by_bit():
    found = dequantize(jnp.asarray(QUANTISED), jnp.asarray(GOLDEN["scale"]), "bfloat16")
    np.testing.assert_array_equal(np.asarray(found), NUMBERS)


def test_transformers_makes_the_same_of_a_weight():
    """Scales to a rounding, as it multiplies by the inverse; a number on the edge of two may then be the other."""
    quantised, scale = tensors_of("fp8", WEIGHT)
    zeros = np.array([[False, True, False], [False, False, False]])  # transformers' scale of zeros is 1
    np.testing.assert_allclose(scale[~zeros], GOLDEN["scale"][~zeros], rtol=3e-7)
    assert (quantised != QUANTISED).mean() < 1e-3
    error = np.abs(quantised.astype(np.float32) - QUANTISED.astype(np.float32))
    assert (error <= np.abs(QUANTISED.astype(np.float32)) / 8 + 2**-9).all()

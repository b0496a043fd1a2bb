"""`add_rms_norm` against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.add_rms_norm import add_rms_norm

IMPLEMENTATIONS = ["reference", "interpret", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "size"), [(3, 1024), (1, 2560)])
@pytest.mark.timeout(120)
def test_adds_and_normalises_each_row(implementation: str, rows: int, size: int):
    rng = np.random.default_rng(0)
    make = lambda *shape: np.array(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16))
    x, delta, weight = make(rows, size), make(rows, size), make(size)
    x[-1] = 1e-3  # eps counts here
    delta[-1] = 0
    added, normed = add_rms_norm(x, delta[None], weight, eps=1e-6, implementation=implementation)
    expected = x.astype(np.float64) + delta.astype(np.float64)
    assert np.array_equal(np.asarray(added), expected.astype(x.dtype))
    expected = np.asarray(added, np.float64)
    expected = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-6) * weight.astype(np.float64)
    np.testing.assert_allclose(np.asarray(normed, np.float64), expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.timeout(120)
def test_float32_parts_are_summed_before_they_are_rounded(implementation: str):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 512)), jnp.bfloat16)
    parts = jnp.asarray(rng.standard_normal((3, 2, 512)), jnp.float32)
    added, _ = add_rms_norm(x, parts, jnp.ones(512, jnp.bfloat16), eps=1e-6, implementation=implementation)
    expected = x + ((parts[0] + parts[1]) + parts[2]).astype(jnp.bfloat16)
    assert np.array_equal(np.asarray(added), np.asarray(expected))


def test_shapes_that_do_not_fit_are_refused():
    x = jnp.zeros((2, 8))
    with pytest.raises(ValueError, match="add_rms_norm"):
        add_rms_norm(x, jnp.zeros((1, 3, 8)), jnp.zeros(8), eps=1e-6)

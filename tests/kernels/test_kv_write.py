"""`kv_write`: which slots change, and that nothing is copied when the cache is donated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.kv_write import kv_write
from qjax.kernels.paged_attention import paged_decode

L, P, K, S, H = 3, 5, 2, 16, 64


def written(dtype, implementation: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    kv = np.asarray(jnp.asarray(rng.standard_normal((L, 2, P, K, S, H)), dtype))
    k, v = (np.asarray(jnp.asarray(rng.standard_normal((6, K, H)), dtype)) for _ in range(2))
    slots = np.array([17, -1, P * S - 1, 3, -1, 64], np.int32)  # the last slot of all; skipped rows beside it
    expected = kv.copy()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[1, 0, slot // S, :, slot % S] = k[row]
            expected[1, 1, slot // S, :, slot % S] = v[row]
    return expected, np.asarray(kv_write(kv, k, v, slots, layer=1, implementation=implementation))


IMPLEMENTATIONS = ["reference", "interpret", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.timeout(60)
def test_writes_its_slots_and_nothing_else(implementation: str, dtype):
    expected, out = written(dtype, implementation)
    assert out.tobytes() == expected.tobytes()


def test_donated_cache_is_written_in_place():
    """Three layers of write, attend, write: the compiled step has no room for a copy of the cache."""
    shape = jax.ShapeDtypeStruct
    kv = shape((L, 2, 512, K, S, H), jnp.float32)

    def step(kv, q, page_table, context_lens, slots):
        for layer in range(L):
            kv = kv_write(kv, q[:, :K], q[:, K:], slots, layer=layer, implementation="reference")
            q = q + paged_decode(q, kv, page_table, context_lens, layer=layer, implementation="reference")
        return kv, q

    args = (kv, shape((2, 4, H), jnp.float32), shape((2, 8), jnp.int32), shape((2,), jnp.int32), shape((2,), jnp.int32))
    memory = jax.jit(step, donate_argnums=0).lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == kv.size * 4
    assert memory.temp_size_in_bytes < kv.size * 4 / L / 4


def test_shapes_that_do_not_fit_are_refused():
    kv, k = jnp.zeros((L, 2, P, K, S, H)), jnp.zeros((3, K, H))
    with pytest.raises(ValueError, match="do not fit the cache"):
        kv_write(kv, k, k, jnp.zeros(4, jnp.int32), layer=0)

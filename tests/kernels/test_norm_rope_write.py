"""`norm_rope_write`: queries, which slots change, and that nothing is copied when the cache is donated."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.kernels.norm_rope_write import norm_rope_write
from qjax.kernels.paged_attention import paged_decode

L, P, S = 3, 5, 16
SLOTS = np.array([17, -1, P * S - 1, 3, -1, 64], np.int32)  # the last slot of all; skipped rows beside it
IMPLEMENTATIONS = ["reference", "interpret", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]


def oracle(kv, qkv, norms, cos, sin) -> tuple[np.ndarray, np.ndarray]:
    """In float64, row by row; kv as it is where nothing is written."""
    kinds, H = qkv.shape[2:]
    rows = qkv.astype(np.float64)
    for kind in range(kinds - 1):
        row = rows[:, :, kind]
        if norms is not None:
            weight = np.asarray(norms[int(kind == kinds - 2)], np.float64)
            row = row / np.sqrt((row**2).mean(-1, keepdims=True) + 1e-6) * weight
        low, high = row[..., : H // 2], row[..., H // 2 :]
        c, s = cos[:, None], sin[:, None]
        rows[:, :, kind] = np.concatenate([low * c - high * s, high * c + low * s], axis=-1)
    out = kv.astype(np.float64)
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            out[1, :, slot // S, :, slot % S] = rows[token, :, -2:].swapaxes(0, 1)
    return rows[:, :, :-2], out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("heads", "has_norms", "num_parts"), [((4, 2), True, 1), ((2, 1), False, 1), ((16, 8), True, 3)], ids=str
)
@pytest.mark.timeout(120)
def test_rotates_and_writes_its_slots_and_nothing_else(
    implementation: str, heads: tuple[int, int], has_norms: bool, num_parts: int
):
    (N, K), H, T = heads, 128, len(SLOTS)
    rng = np.random.default_rng(0)
    make = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16))
    kv, qkv = make(L, 2, P, K, S, H), make(T, K, N // K + 2, H)
    norms = (make(H), make(H)) if has_norms else None
    angle = rng.uniform(0, 6, (T, H // 2)).astype(np.float32)
    args = (kv, qkv, norms, np.cos(angle), np.sin(angle))
    parts = qkv[None]
    if num_parts > 1:  # float32, and nothing is lost when they are added up
        rest = rng.integers(-4, 4, (num_parts - 1, *qkv.shape)).astype(np.float32)
        parts = np.concatenate([rest, qkv.astype(np.float32)[None] - rest.sum(0)])
    given = jax.tree.map(jnp.asarray, (kv, parts, *args[2:]))
    q, out = norm_rope_write(*given, SLOTS, eps=1e-6, layer=1, implementation=implementation)
    expected_q, expected = oracle(*args)
    np.testing.assert_allclose(np.asarray(q, np.float64), expected_q, atol=0.03, rtol=0.02)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.03, rtol=0.02)
    untouched = np.ones(kv.shape, bool)
    for slot in SLOTS[SLOTS >= 0]:
        untouched[1, :, slot // S, :, slot % S] = False
        assert np.array_equal(np.asarray(out)[1, 1, slot // S, :, slot % S], qkv[slot == SLOTS][0, :, -1])
    assert np.asarray(out)[untouched].tobytes() == kv[untouched].tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "has_scales"), [((8, 4), True), ((2, 1), False), ((2, 1), True)], ids=str)
@pytest.mark.timeout(120)
def test_e4m3_cache_gets_what_the_formula_says(implementation: str, heads: tuple[int, int], has_scales: bool):
    """Bit by bit, of the keys and values that a bfloat16 cache gets: rounded to nearest, saturated, NaN kept."""
    (N, K), H, T = heads, 128, len(SLOTS)
    rng = np.random.default_rng(1)
    spread = lambda *shape: rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)  # subnormal to too large
    make = lambda *shape: jnp.asarray(spread(*shape), jnp.bfloat16)
    qkv = make(T, K, N // K + 2, H).at[0, 0, -1, :4].set(jnp.asarray([np.nan, np.inf, -1e30, 448.0], jnp.bfloat16))
    angle = rng.uniform(0, 6, (T, H // 2)).astype(np.float32)
    norms = (make(H), make(H))
    args = (qkv[None], norms, np.cos(angle), np.sin(angle), SLOTS)
    run = functools.partial(norm_rope_write, eps=1e-6, layer=1, implementation=implementation)
    # Waited for: the interpreter's callbacks compute with jax, and can lock up with what is dispatched meanwhile.
    wide_q, wide = jax.block_until_ready(run(jnp.zeros((L, 2, P, K, S, H), jnp.bfloat16), *args))
    scales = jnp.asarray(rng.uniform(0.02, 2, (2, K)), jnp.float32) if has_scales else None
    cache = jnp.full((L, 2, P, K, S, H), 0x7F, jnp.uint8)  # NaN
    q, narrow = run(cache, *args, scales, dtype=jnp.bfloat16)
    assert np.asarray(q).tobytes() == np.asarray(wide_q, np.float32).astype(np.float16).tobytes()

    expected = np.array(cache)
    for slot in SLOTS[SLOTS >= 0]:
        rows = np.asarray(wide)[1, :, slot // S, :, slot % S].astype(np.float32)  # [2, K, H]
        rows = rows if scales is None else rows / np.asarray(scales)[:, :, None]
        clipped = np.clip(rows, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        expected[1, :, slot // S, :, slot % S] = clipped.view(np.uint8)
        assert (np.abs(rows) > 448).any() and (np.abs(rows) < 2**-7).any()
    assert np.asarray(narrow).tobytes() == expected.tobytes()


def test_donated_cache_is_written_in_place():
    """Three layers of write, attend, write: the compiled step has no room for a copy of the cache."""
    K, H = 2, 64
    shape = jax.ShapeDtypeStruct
    floats = lambda *dims: shape(dims, jnp.float32)
    ints = lambda *dims: shape(dims, jnp.int32)
    kv = floats(L, 2, 512, K, S, H)

    def step(kv, qkv, cos, page_table, context_lens, slots):
        for layer in range(L):
            rope = (cos, cos)
            q, kv = norm_rope_write(kv, qkv[None], None, *rope, slots, eps=0, layer=layer, implementation="reference")
            flat = q.reshape(2, 2 * K, H)
            q = paged_decode(flat, kv, page_table, context_lens, layer=layer, implementation="reference")
            qkv = qkv.at[:, :, :2].add(q.reshape(2, K, 2, H))
        return kv, qkv

    args = (kv, floats(2, K, 4, H), floats(2, H // 2), ints(2, 8), ints(2), ints(2))
    memory = jax.jit(step, donate_argnums=0).lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == kv.size * 4
    assert memory.temp_size_in_bytes < kv.size * 4 / L / 4


def test_shapes_that_do_not_fit_are_refused():
    kv, qkv, cos = jnp.zeros((L, 2, P, 2, S, 64)), jnp.zeros((1, 3, 2, 4, 64)), jnp.zeros((3, 32))
    with pytest.raises(ValueError, match="do not fit the cache"):
        norm_rope_write(kv, qkv, None, cos, cos, jnp.zeros(4, jnp.int32), eps=0, layer=0)
    slots = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r"scales \(2, 2\) for a cache"):
        norm_rope_write(kv, qkv, None, cos, cos, slots, jnp.ones((2, 2)), eps=0, layer=0)
    with pytest.raises(ValueError, match="needs the model's dtype"):
        norm_rope_write(kv.astype(jnp.uint8), qkv, None, cos, cos, slots, eps=0, layer=0)

"""The sampler against numpy: which tokens can be drawn, how often, and that a row knows nothing of its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.engine import sampler
from qjax.engine.sampler import (
    PenaltyBatch,
    SamplingBatch,
    apply_logit_edits,
    apply_penalties,
    greedy,
    logprobs_of,
    sample,
    split_seed,
)

INF = float("inf")
jit_sample, jit_greedy = jax.jit(sample), jax.jit(greedy)
jit_logprobs = jax.jit(logprobs_of, static_argnums=2)


def options(num_rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=None, counter=None) -> SamplingBatch:
    """Each option a number for all rows, or one a row. By default each row has its own seed."""
    rows = lambda value, dtype: np.broadcast_to(np.asarray(value, dtype), (num_rows,))
    seeds = [split_seed(s) for s in np.broadcast_to(range(num_rows) if seed is None else seed, num_rows).tolist()]
    return SamplingBatch(
        temperature=rows(temperature, np.float32),
        top_k=rows(top_k, np.int32),
        top_p=rows(top_p, np.float32),
        min_p=rows(min_p, np.float32),
        seeds=np.asarray(seeds, np.uint32),
        counters=rows(0 if counter is None else counter, np.int32),
    )


def normal(*shape, scale=3.0, seed=0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(size=shape) * scale, -3e38, 3e38).astype(np.float32)


def expected_z(logits, temperature) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (logits - logits.max()) / np.clip(np.float32(temperature), 1e-6, 1e6)


def expected_support(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """bool [V]: what one row can draw, by sorting, in float64."""
    z = expected_z(logits, temperature).astype(np.float64)
    keep = np.exp(z) >= min_p
    if 0 < top_k < len(z):
        keep &= logits >= np.sort(logits)[-top_k]
    p = np.where(keep, np.exp(z), 0.0)
    if top_p < 1.0:
        order = np.argsort(-logits, kind="stable")
        last = np.searchsorted(np.cumsum(p[order]) / p.sum(), top_p)
        keep &= logits >= logits[order[min(last, len(p) - 1)]]
    return keep & (p > 0)


GRID = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.95, "temperature": 0.6},  # Qwen3's own
    {"top_k": 50, "top_p": 0.5, "min_p": 0.01, "temperature": 1.7},
    {"temperature": 1e-2, "top_p": 0.9},
    {},
    {"temperature": 1e-30},
    {"temperature": 1e30, "top_p": 0.5},
]
KINDS = {
    "normal": lambda: normal(6, 211),
    "peaked": lambda: normal(6, 211, scale=30.0),
    "flat": lambda: normal(6, 211, scale=1e-3),
    "ties": lambda: np.round(normal(6, 211)),
    "equal": lambda: np.full((6, 211), -2.5, np.float32),
    "banned": lambda: np.where(np.random.default_rng(1).random((6, 211)) < 0.9, -INF, normal(6, 211)).astype("f4"),
    "zeros": lambda: np.where(np.random.default_rng(2).random((6, 211)) < 0.5, -0.0, 0.0).astype("f4"),
    "huge": lambda: normal(6, 211, scale=1e38),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", GRID, ids=str)
def test_the_tokens_that_can_be_drawn(kind, settings):
    logits = KINDS[kind]()
    num_rows = len(logits)
    z, keep = jax.jit(sampler.kept_tokens)(jnp.asarray(logits), options(num_rows, **settings))
    z, keep = np.asarray(z), np.asarray(keep)
    for row in range(num_rows):
        np.testing.assert_allclose(z[row], expected_z(logits[row], settings.get("temperature", 1.0)), rtol=1e-6)
        drawable = keep[row] & (np.exp(z[row].astype(np.float64)) > 1e-30)
        near = {**settings, "top_p": settings.get("top_p", 1.0)}
        # Where the sum comes within 2e-6 of top_p, float32 may fall on either side.
        low, high = (
            expected_support(logits[row], **near | {"top_p": near["top_p"] + slack if near["top_p"] < 1 else 1.0})
            & (np.exp(z[row].astype(np.float64)) > 1e-30)
            for slack in (-2e-6, 2e-6)
        )
        assert not np.any(low & ~drawable), "a likely token is lost"
        assert not np.any(drawable & ~high), "an unlikely token is kept"
        if near["top_p"] == 1.0:
            np.testing.assert_array_equal(low, high)
        assert drawable[logits[row].argmax()]


def test_thresholds_of_a_large_vocabulary():
    size = 151_936
    logits = normal(3, size)
    batch = options(3, top_k=[20, 0, 5000], top_p=[1.0, 0.9, 0.9])
    keep = np.asarray(jax.jit(sampler.kept_tokens)(jnp.asarray(logits), batch)[1])
    assert keep[0].sum() == 20
    np.testing.assert_array_equal(keep[0], logits[0] >= np.sort(logits[0])[-20])
    p = np.where(logits >= np.sort(logits, axis=1)[:, [-size, -size, -5000]].diagonal()[:, None], logits, -INF)
    p = np.exp(p.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    for row in (1, 2):
        mass, least = p[row][keep[row]].sum(), p[row][keep[row]].min()
        assert 0.9 - 1e-6 <= mass < 0.9 + least + 1e-6


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"temperature": 2.0, "min_p": 0.1}, {"top_p": 0.7}],
    ids=str,
)
@pytest.mark.parametrize("vary", ["seed", "counter"])
def test_frequencies(settings, vary):
    size, num_rows, num_calls = 37, 4096, 8
    logits = normal(size, scale=1.5)
    support = expected_support(logits, **settings)
    p = np.where(support, np.exp(expected_z(logits, settings.get("temperature", 1.0)).astype(np.float64)), 0)
    p /= p.sum()
    counts = np.zeros(size)
    for call in range(num_calls):
        numbers = np.arange(num_rows) + call * num_rows
        where = {"seed": numbers, "counter": 5} if vary == "seed" else {"seed": 12345, "counter": numbers}
        batch = options(num_rows, **settings, **where)
        tokens = jit_sample(jnp.broadcast_to(logits, (num_rows, size)), batch)
        counts += np.bincount(np.asarray(tokens), minlength=size)
    assert counts[~support].sum() == 0
    expected = p[support] * counts.sum()
    chi_square = ((counts[support] - expected) ** 2 / expected).sum()
    freedom = support.sum() - 1
    assert expected.min() > 5
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # fails by luck once in 10 000, and the seeds are fixed


def test_noise_is_finite_and_fine_where_it_is_large():
    extremes = jnp.asarray([0, 1, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32)
    noise = np.asarray(jax.jit(sampler._gumbel_of_bits)(extremes))
    assert np.all(np.isfinite(noise))
    assert np.all(np.diff(noise) <= 0)
    assert abs(noise[0] - np.log(2.0**33)) < 1e-4
    # Two tokens of a large, flat vocabulary tie only if they have the same 32 bits.
    noise = np.asarray(jax.jit(sampler._gumbel_of_bits)(jnp.arange(100_000, dtype=jnp.uint32)))
    assert np.all(np.diff(noise) < 0)
    ids = np.tile(np.arange(50_000, dtype=np.int32), (2, 1))
    noise = np.asarray(jax.jit(sampler._gumbel)(options(2).seeds, jnp.zeros(2, jnp.int32), ids))
    assert np.allclose(noise.mean(axis=1), 0.5772, atol=0.03)
    assert np.allclose(noise.var(axis=1), np.pi**2 / 6, atol=0.05)


def mixed_batch(num_rows, size):
    rng = np.random.default_rng(7)
    pick = lambda *values: rng.choice(values, num_rows)
    settings = {
        "temperature": pick(0.0, 0.6, 1.0, 2.0),
        "top_k": pick(0, 1, 20, 100, 10**6),
        "top_p": pick(1.0, 0.95, 0.5),
        "min_p": pick(0.0, 0.02),
        "seed": rng.integers(-(2**63), 2**63 - 1, num_rows),
        "counter": rng.integers(0, 10_000, num_rows),
    }
    return normal(num_rows, size, seed=8), settings


@pytest.mark.parametrize("size", [5, 6144])
def test_a_row_alone_draws_as_in_any_batch(size):
    num_rows = 24
    logits, settings = mixed_batch(num_rows, size)
    tokens = np.asarray(jit_sample(jnp.asarray(logits), options(num_rows, **settings)))
    order = np.random.default_rng(9).permutation(num_rows)
    for rows in (order, order[:5], *([row] for row in range(num_rows))):
        some = options(len(rows), **{name: value[rows] for name, value in settings.items()})
        np.testing.assert_array_equal(np.asarray(jit_sample(jnp.asarray(logits[rows]), some)), tokens[rows])


def few_settings(num_rows) -> dict:
    settings = mixed_batch(num_rows, 1)[1]
    top_k = np.random.default_rng(3).choice([1, 2, 20, 63, sampler.MAX_FEW], num_rows)
    return {**settings, "top_k": np.where(settings["temperature"] > 0, top_k, settings["top_k"])}


@pytest.mark.parametrize("size", [2049, 6144, 50_000])
@pytest.mark.parametrize("kind", ["normal", "rounded", "together", "banned"])
def test_small_top_k_draws_the_same_tokens_from_the_likely_blocks(size, kind):
    num_rows = 64
    settings, logits = few_settings(num_rows), normal(num_rows, size, seed=4)
    match kind:
        case "rounded":  # ties at every rank, but not in more than 64 blocks of the largest ones
            logits = np.round(logits * 40) / 40
        case "together":  # the largest in few blocks
            logits[:, 100:170] += 30
        case "banned":
            logits[:, :-40] = -np.inf
    batch = options(num_rows, **settings)
    few = jax.jit(sampler.sample, static_argnames="is_few")(jnp.asarray(logits), batch, is_few=True)
    np.testing.assert_array_equal(np.asarray(few), np.asarray(jit_sample(jnp.asarray(logits), batch)))


def test_small_top_k_of_equal_logits_draws_some_token():
    logits = jnp.zeros((3, 10_000)).at[1, 0].set(jnp.nan).at[2].set(-jnp.inf)
    few = jax.jit(sampler.sample, static_argnames="is_few")(logits, options(3, top_k=20), is_few=True)
    assert 0 <= few[0] < 10_000
    assert few[1:].tolist() == [-1, -1]


def test_noise_is_jax_s_own():
    key = jax.random.fold_in(jax.random.wrap_key_data(np.asarray([1, 2], np.uint32), impl="threefry2x32"), 7)
    bits = jax.random.bits(key, (3000,), jnp.uint32)
    ids = np.asarray([[5, 2999, 0, 700]], np.int32)
    noise = sampler._gumbel(np.asarray([[1, 2]], np.uint32), np.asarray([7]), ids)
    np.testing.assert_array_equal(np.asarray(noise), np.asarray(sampler._gumbel_of_bits(bits[ids])))


def test_greedy_rows_are_argmax_in_a_mixed_batch():
    logits, settings = mixed_batch(64, 101)
    logits = np.round(logits)  # ties: the lowest id wins
    tokens = np.asarray(jit_sample(jnp.asarray(logits), options(64, **settings)))
    is_greedy = settings["temperature"] == 0
    assert 0 < is_greedy.sum() < 64
    np.testing.assert_array_equal(tokens[is_greedy], logits.argmax(axis=1)[is_greedy])
    np.testing.assert_array_equal(np.asarray(jit_greedy(jnp.asarray(logits))), logits.argmax(axis=1))
    all_greedy = jit_sample(jnp.asarray(logits), options(64, **{**settings, "temperature": 0.0}))
    np.testing.assert_array_equal(np.asarray(all_greedy), logits.argmax(axis=1))


def test_the_draw_is_a_function_of_seed_and_counter():
    logits = jnp.zeros((1, 10_000))
    draw = lambda seed, counter: int(jit_sample(logits, options(1, seed=[seed], counter=counter))[0])
    assert draw(1, 2) == draw(1, 2)
    seeds = (0, 1, -1, 2**32, 2**33, 2**32 + 1, 2**62, -(2**63))  # both halves count
    assert len({draw(seed, counter) for seed in seeds for counter in (0, 1, 2)}) >= 23


@pytest.mark.parametrize(
    "bad",
    [[float("nan"), 1, 2], [1, 2, float("nan")], [-float("nan")] * 3, [-INF] * 3, [1, INF, 2], [INF, float("nan"), 0]],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_numbers_gives_minus_one_and_spares_the_others(bad, temperature):
    good = [0.0, 5.0, -INF]
    logits = jnp.asarray([good, bad, good], jnp.float32)
    batch = options(3, temperature=temperature, top_k=2, top_p=0.5)
    assert jit_sample(logits, batch).tolist() == [1, -1, 1]
    assert jit_greedy(logits).tolist() == [1, -1, 1]


def test_the_only_token_left_is_drawn():
    logits = np.full((100, 11), -INF, np.float32)
    tokens = np.arange(100) % 11
    logits[np.arange(100), tokens] = -1e30
    for settings in ({}, {"top_k": 3, "top_p": 0.1, "min_p": 1.0}):
        np.testing.assert_array_equal(jit_sample(jnp.asarray(logits), options(100, **settings)), tokens)


def test_nothing_is_sorted():
    text = jax.jit(sample).lower(jnp.zeros((4, 64)), options(4, top_k=3, top_p=0.5)).as_text()
    text += jit_logprobs.lower(jnp.zeros((4, 64)), jnp.zeros(4, jnp.int32), 20).as_text()
    assert "stablehlo.while" in text
    assert "stablehlo.sort" not in text
    assert "chlo.top_k" not in text


def test_penalties():
    rng = np.random.default_rng(3)
    num_rows, size = 7, 53
    logits = normal(num_rows, size)
    logits[:, 5] = -INF
    logits[:, 6] = 0.0
    counts = rng.integers(0, 4, (num_rows, size)) * (rng.random((num_rows, size)) < 0.4)
    in_prompt = rng.random((num_rows, size)) < 0.3
    repetition = np.asarray([1.0, 1.3, 0.7, 1.0, 1.0, 2.0, 1.1], np.float32)
    presence = np.asarray([0.0, 0.0, 0.0, 1.5, 0.0, -2.0, 0.3], np.float32)
    frequency = np.asarray([0.0, 0.0, 0.0, 0.0, 0.7, 1.0, -0.4], np.float32)
    expected = logits.copy()
    for r in range(num_rows):
        for v in range(size):
            if in_prompt[r, v] or counts[r, v]:
                x = expected[r, v]
                expected[r, v] = x / repetition[r] if x > 0 else x * repetition[r]
            expected[r, v] -= frequency[r] * counts[r, v]
            if counts[r, v]:
                expected[r, v] -= presence[r]
    for dtype in (np.int32, np.uint16):
        penalties = PenaltyBatch(jnp.asarray(repetition), jnp.asarray(presence), jnp.asarray(frequency))
        got = jax.jit(apply_penalties)(
            jnp.asarray(logits), jnp.asarray(counts.astype(dtype)), jnp.asarray(in_prompt), penalties
        )
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got[0], logits[0])  # a row without penalties is not touched


def test_logit_edits():
    logits = normal(5, 9)
    ids = np.asarray([[-1, -1, -1], [3, 8, -1], [0, 3, 3], [2, 5, -1], [-1, 4, 4]], np.int32)
    values = np.asarray([[9, 9, 9], [1.5, -INF, 9], [-1, 2, 3], [0, 0.5, 9], [9, -INF, 50]], np.float32)
    only_listed = np.asarray([False, False, False, True, True])
    expected = logits.copy()
    expected[1, 3] += 1.5
    expected[1, 8] = -INF
    expected[2, 0] -= 1
    expected[2, 3] += 5
    expected[3] = -INF
    expected[3, [2, 5]] = logits[3, [2, 5]] + [0, 0.5]
    expected[4] = -INF  # the one allowed token is banned
    got = jax.jit(apply_logit_edits)(*map(jnp.asarray, (logits, ids, values, only_listed)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert jit_greedy(got)[4] == -1


@pytest.mark.parametrize("num", [0, 1, 20, 32, 33, 301])
@pytest.mark.parametrize("kind", ["normal", "ties", "banned"])
def test_logprobs(num, kind):
    num_rows, size = 6, 301
    logits = normal(num_rows, size, scale=4.0)
    if kind == "ties":
        logits = np.round(logits)
    if kind == "banned":
        logits[:, 10:290] = -INF
    tokens = np.asarray([0, 300, 5, 7, 150, -1], np.int32)
    logprob, rank, top_ids, top_logprobs = jit_logprobs(jnp.asarray(logits), jnp.asarray(tokens), num)
    assert (logprob.dtype, rank.dtype, top_ids.dtype, top_logprobs.dtype) == ("float32", "int32", "int32", "float32")
    assert (top_ids.shape, top_logprobs.shape) == ((num_rows, num), (num_rows, num))
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    columns = np.maximum(tokens, 0)
    np.testing.assert_allclose(logprob, exact[np.arange(num_rows), columns], rtol=1e-6, atol=1e-6)
    assert rank.tolist() == [1 + int((logits[r] > logits[r, c]).sum()) for r, c in enumerate(columns)]
    order = np.argsort(-logits, axis=1, kind="stable")[:, :num]
    np.testing.assert_array_equal(top_ids, order)
    np.testing.assert_allclose(top_logprobs, np.take_along_axis(exact, order, axis=1), rtol=1e-6, atol=1e-6)


def test_seeds_are_split_as_jax_does():
    for seed in (0, 1, 2**31 - 1):
        assert split_seed(seed) == tuple(jax.random.key_data(jax.random.key(seed)).tolist())
    assert split_seed(-1) == (2**32 - 1, 2**32 - 1)
    assert split_seed(2**32 + 5) == (1, 5)

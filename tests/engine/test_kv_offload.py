"""KV pages in the host's memory: the same tokens and logprobs as without, under a cache that holds one conversation."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import EngineConfig, SamplingParams
from qjax.engine import kv_offload
from qjax.engine.block_pool import page_hashes
from qjax.engine.kv_offload import OffloadingRunner
from qjax.engine.memory import Device, plan
from qjax.models.config import ModelConfig
from tests.engine.conftest import TINY, make_llm
from tests.server.serving import serving

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3)
PAGE_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, tokens, numbers, float32
SMALL = {"max_model_len": 128, "kv_cache_memory_bytes": 11 * PAGE_BYTES}
ENOUGH = {"kv_offloading_size": 100 * PAGE_BYTES / 2**30}
rng = random.Random(3)
PROMPTS = [[rng.randrange(3, 480) for _ in range(70 + 7 * i)] for i in range(5)]


def poison(engine):
    """Nothing may be read that nobody has written."""
    runner = engine.runner
    value = 255 if runner.kv.dtype == jnp.uint8 else jnp.nan  # the byte is NaN, too
    runner.kv = jax.device_put(jnp.full(runner.kv.shape, value, runner.kv.dtype), runner.kv.sharding)


def converse(llm, prompts=PROMPTS, turns=3):
    """One conversation after the other, and again with what was answered: (tokens, logprobs, tokens cached)."""
    texts, out = [list(p) for p in prompts], []
    for _ in range(turns):
        for text in texts:
            [output] = llm.generate([list(text)], GREEDY, use_tqdm=False)
            answer = output.outputs[0]
            logprobs = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            out.append((answer.token_ids, logprobs, output.num_cached_tokens))
            text += [*answer.token_ids, 11, 12]
    llm.engine.scheduler.check_integrity()
    assert llm.engine.pool.usage == 0
    return out


def assert_same(got, expected):
    assert [tokens for tokens, _, _ in got] == [tokens for tokens, _, _ in expected]
    np.testing.assert_allclose([ps for _, ps, _ in got], [ps for _, ps, _ in expected], atol=2e-4)


def count(llm, name):
    [line] = [x for x in llm.engine.metrics.render().decode().splitlines() if x.startswith(name + "{")]
    return float(line.rpartition(" ")[2])


@pytest.fixture(scope="module")
def expected(tiny_folder):
    return converse(make_llm(tiny_folder, **SMALL))


@pytest.fixture(scope="module")
def llm(tiny_folder):
    return make_llm(tiny_folder, **SMALL, **ENOUGH)


@pytest.fixture(autouse=True)
def forget(request):
    if "llm" in request.fixturenames:
        assert request.getfixturevalue("llm").reset_prefix_cache(reset_connector=True)


def test_a_returning_conversation_is_copied_and_not_computed(llm, expected):
    assert not any(cached for _, _, cached in expected), "a cache of this size should hold one conversation alone"
    poison(llm.engine)
    before = [count(llm, f"vllm:{name}_total") for name in ("external_prefix_cache_hits", "kv_offload_load_bytes")]
    got = converse(llm)
    assert_same(got, expected)
    assert [cached for _, _, cached in got[:5]] == [0] * 5
    assert all(cached >= len(PROMPTS[i % 5]) // 16 * 16 for i, (_, _, cached) in enumerate(got[5:]))
    hits = count(llm, "vllm:external_prefix_cache_hits_total") - before[0]
    assert hits == sum(cached for _, _, cached in got) and count(llm, "vllm:prefix_cache_hits_total") == 0
    assert count(llm, "vllm:kv_offload_load_bytes_total") - before[1] == hits / 16 * PAGE_BYTES
    assert 0 < count(llm, "qjax:kv_offload_usage_perc") <= 1


def test_a_branch_of_what_was_copied_in(llm, tiny_folder):
    """Keys know their positions, so pages that change places show only where some of them are used alone."""
    branch = [*PROMPTS[4][:40], *PROMPTS[0][:12]]
    [expected] = converse(make_llm(tiny_folder, **SMALL), [branch], 1)
    converse(llm, PROMPTS[::-1], 1)
    [back, got] = converse(llm, [PROMPTS[4], branch], 1)
    assert (back[2], got[2]) == (96, 32) and count(llm, "vllm:prefix_cache_hits_total") == 32
    assert_same([got], [expected])


def test_the_host_is_bounded(tiny_folder, expected):
    llm = make_llm(tiny_folder, **SMALL, kv_offloading_size=12.5 * PAGE_BYTES / 2**30)
    assert_same(converse(llm), expected)
    assert len(llm.engine.pool.host) == 12 and count(llm, "qjax:kv_offload_usage_perc") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "fp8", "tensor_parallel_size": 2, "kv_cache_memory_bytes": 11 * PAGE_BYTES // 8},
        {"tensor_parallel_size": 4, "kv_cache_memory_bytes": 11 * PAGE_BYTES // 2},  # two devices hold each head
    ],
    ids=str,
)
def test_fp8_and_several_devices(tiny_folder, options):
    without = converse(make_llm(tiny_folder, **SMALL | options), PROMPTS[:3], 2)
    llm = make_llm(tiny_folder, **SMALL | options, **ENOUGH)
    poison(llm.engine)
    got = converse(llm, PROMPTS[:3], 2)
    assert_same(got, without)
    assert all(cached >= 64 for _, _, cached in got[3:]) and not any(cached for _, _, cached in without)
    page = next(iter(llm.engine.pool.host._pages.values()))
    assert page.sharding.memory_kind == "pinned_host" and page.dtype == llm.engine.runner.kv.dtype
    assert page.sharding.num_devices == options.get("tensor_parallel_size", 1)
    assert page.nbytes == llm.engine.plan.host_page_bytes


def crowd(engine, seed):
    """Many at a time in too small a cache: they are preempted, some are aborted, and some come again. Texts by id."""
    rng, ids, ended, known = random.Random(seed), {}, set(), []
    for number in range(2000):
        if number < 60 and engine.num_running + engine.num_waiting < 8:
            prompt = [*rng.choice(known or PROMPTS)[: rng.choice([40, 80])], rng.randrange(3, 480)]
            params = GREEDY.with_(max_tokens=rng.choice([3, 20, 33]), logprobs=None)
            engine.add_request(f"r{number}", prompt, params, cache_salt=rng.choice([None, None, "s"]))
            ids[f"r{number}"] = (prompt, [])
        for output in engine.step():
            ids[output.request_id][1].extend(output.outputs[0].token_ids)
            if output.outputs[0].finish_reason == "length":
                ended.add(output.request_id)
                prompt, answer = ids[output.request_id]
                known.append([*prompt, *answer][:90])
        if number % 7 == 3 and (running := engine.request_ids):
            engine.abort(rng.choice(running))
        if number >= 60 and not engine.has_work:
            break
    engine.scheduler.check_integrity()
    assert engine.pool.usage == 0 and not engine.has_work
    return {i: ids[i] for i in ended}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_crowd_with_preemptions_and_aborts(llm, tiny_folder, seed):
    poison(llm.engine)
    got = crowd(llm.engine, seed)
    metrics = llm.engine.metrics.render()
    assert len(got) > 7 and b"vllm:num_preemptions_total" in metrics and llm.engine.pool.host.num_loaded > 20
    assert count(llm, "vllm:num_preemptions_total") > 0
    plain = make_llm(tiny_folder)
    params = [GREEDY.with_(max_tokens=len(tokens), logprobs=None) for _, tokens in got.values()]
    outputs = plain.generate([prompt for prompt, _ in got.values()], params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [tokens for _, tokens in got.values()]


def test_one_trace_a_size(llm):
    """They are made at the start; no number of pages adds one."""
    before = kv_offload.gather._cache_size(), kv_offload.scatter._cache_size()
    for length in range(20, 120, 9):
        converse(llm, [PROMPTS[4][:length], PROMPTS[3]], 2)
    assert (kv_offload.gather._cache_size(), kv_offload.scatter._cache_size()) == before


def test_nobody_waits_for_a_copy_out(llm, expected, monkeypatch):
    """Copies that do not end cost what they would have kept, and nothing else: pages wait, or are computed again."""
    runner = llm.engine.runner

    class Never:
        def is_ready(self):
            return False

        def block_until_ready(self):
            raise AssertionError("somebody waits")

    monkeypatch.setattr(runner, "plan", dataclasses.replace(runner.plan, is_gpu=True, num_staged_pages=4))
    runner._leaving.append((Never(), 4))
    assert_same(converse(llm), expected)
    assert len(llm.engine.pool.host) == 0
    runner._leaving[0] = (Never(), 2)  # room for two
    assert_same(converse(llm), expected)
    runner._leaving.clear()
    assert len(llm.engine.pool.host) > 0


def test_resets_and_new_weights(llm, expected):
    converse(llm, turns=1)
    assert llm.reset_prefix_cache()
    assert_same(again := converse(llm, turns=1), expected[:5])
    assert all(cached > 0 for _, _, cached in again)
    weights = [leaf * 1.5 for leaf in llm.engine.runner.leaves]
    before = [jnp.copy(leaf) for leaf in llm.engine.runner.leaves]
    llm.update_weights(weights)
    other = converse(llm, turns=1)
    assert not any(cached for _, _, cached in other) and [t for t, _, _ in other] != [t for t, _, _ in expected[:5]]
    llm.update_weights(before)
    assert_same(converse(llm), expected)


@pytest.mark.parametrize("level", [1, 2])
def test_what_the_host_keeps_outlives_sleep(llm, expected, level):
    converse(llm, turns=1)
    llm.sleep(level)
    llm.wake_up()
    poison(llm.engine)
    got = converse(llm, turns=1)
    assert_same(got, expected[:5])
    assert all(cached > 0 for _, _, cached in got[:4])


@pytest.mark.parametrize("method", ["run_step", "collect"])
@pytest.mark.parametrize("number", [1, 4])
def test_after_a_step_that_failed(llm, expected, monkeypatch, method, number):
    """What was kept before is used, what the step may have spoiled is not."""
    converse(llm, turns=1)
    num_kept = len(llm.engine.pool.host)
    real, calls = getattr(llm.engine.runner, method), []

    def fails(*args):
        calls.append(None)
        if len(calls) == number:
            llm.engine.runner.kv.delete()
            raise RuntimeError("a bit flipped")
        return real(*args)

    monkeypatch.setattr(llm.engine.runner, method, fails)
    [failed] = llm.generate([[9] * 40 + PROMPTS[2]], GREEDY.with_(max_tokens=9), use_tqdm=False)
    assert failed.outputs[0].finish_reason == "error" and len(calls) > number
    assert num_kept // 2 < len(llm.engine.pool.host)
    poison(llm.engine)
    got = converse(llm, turns=1)
    assert_same(got, expected[:5])
    assert sum(cached > 0 for _, _, cached in got) >= 3


def test_a_request_that_meets_nan_leaves_nothing(llm, monkeypatch):
    monkeypatch.setattr(kv_offload, "FEW", 1)
    host, collect, prompt = llm.engine.pool.host, llm.engine.runner.collect, PROMPTS[4]
    hashes, seen = page_hashes(prompt, 16), []

    def spoil(flight):
        result = collect(flight)
        seen.append(host.count(hashes))
        return dataclasses.replace(result, token_ids=[[-1]]) if len(seen) == 5 else result

    monkeypatch.setattr(llm.engine.runner, "collect", spoil)
    [output] = llm.generate([prompt], GREEDY.with_(max_tokens=20), use_tqdm=False)
    assert output.outputs[0].finish_reason == "error" and seen[4] == len(hashes)
    assert host.count(hashes) == 0 and host.num_wanted == 0


def test_wrong_combinations_are_named(tiny_folder):
    for options, message in (
        ({"kv_offloading_size": 0}, "kv_offloading_size must be more than 0 GiB, got 0"),
        ({"kv_offloading_size": 1, "enable_prefix_caching": False}, "it needs enable_prefix_caching"),
        ({"kv_offloading_size": 1, "nnodes": 2}, r"not supported with several hosts \(nnodes=2\)"),
        ({"kv_offloading_size": "a lot"}, "kv_offloading_size must be of type float"),
        ({"kv_offloading_backend": "lmcache"}, "kv_offloading_backend must be one of native"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig(**options)
    with pytest.raises(ValueError, match="holds no page of the KV cache, 8192 bytes"):
        make_llm(tiny_folder, kv_offloading_size=1e-6)


def test_the_memory_plan_counts_what_is_on_its_way():
    model, gpu = ModelConfig.from_hf(TINY), Device("gpu", 4 * 2**30)
    without, with_it = (plan(EngineConfig(kv_offloading_size=size), model, gpu) for size in (None, 2))
    staged = (with_it.num_staged_pages + 32) * with_it.page_size * with_it.kv_bytes_per_token
    assert with_it.activation_bytes - without.activation_bytes == staged > 0
    assert with_it.num_host_pages == 2 * 2**30 // with_it.host_page_bytes
    assert "KV cache in the host's memory" in with_it.table() and "host" not in without.table()


async def test_over_http(tiny_folder):
    import aiohttp

    options = {"load_format": "dummy", "max_num_seqs": 4, "max_num_batched_tokens": 64}
    config = EngineConfig(model=str(tiny_folder), **options, **SMALL, **ENOUGH)
    async with serving(config, served_model_name=["tiny"]) as (url, engine), aiohttp.ClientSession() as session:
        assert isinstance(engine.engine.runner, OffloadingRunner)

        async def ask(prompt):
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
            async with session.post(f"{url}/v1/completions", json=body) as response:
                answer = await response.json()
                return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        first = [await ask(prompt) for prompt in PROMPTS]
        again = [await ask(prompt) for prompt in PROMPTS]
        assert [text for text, _ in again] == [text for text, _ in first]
        assert [cached for _, cached in first] == [0] * 5
        assert [cached for _, cached in again] == [(len(p) - 1) // 16 * 16 for p in PROMPTS]
        async with session.post(f"{url}/reset_prefix_cache?reset_external=true") as response:
            assert await response.json() == {"success": True}
        assert (await ask(PROMPTS[0]))[1] == 0
        async with session.get(f"{url}/metrics") as response:
            assert "vllm:external_prefix_cache_hits_total" in await response.text()

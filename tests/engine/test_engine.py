"""The engine end to end on a tiny model: texts alone and in a crowd, stopping, sampling options, memory pressure."""

import itertools
import json
import shutil

import jax.numpy as jnp
import pytest

from qjax import SamplingParams
from qjax.checkpoint.safetensors import save_params
from qjax.outputs import CompletionOutput, RequestOutput
from qjax.sampling_params import StructuredOutputsParams
from tests.engine.conftest import make_llm

PROMPTS = [
    "Hello world, this is a test",
    "The capital of France is Paris and",
    "def add(a, b):\n    return",
    "One, two, three, four, five, six, seven,",
    "你好，世界。今天天气很好",
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def ids(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(llm):
    """Greedy answers, one request at a time."""
    return [ids(llm.generate(p, GREEDY, use_tqdm=False))[0] for p in PROMPTS]


def assert_idle(llm):
    engine = llm.engine
    engine.pool.check_integrity()
    engine.scheduler.check_integrity()
    assert engine.num_running == 0 and not engine.has_unfinished and not engine.scheduler.has_work
    assert not engine._answers and not engine._groups


def test_greedy_text_is_the_same_alone_and_in_a_crowd(llm, alone):
    crowd = llm.generate(PROMPTS * 8, GREEDY, use_tqdm=False)
    assert ids(crowd) == alone * 8
    assert [o.prompt for o in crowd] == PROMPTS * 8
    assert_idle(llm)


def test_a_seed_gives_the_same_text_alone_and_among_64_others(llm):
    mine = SamplingParams(temperature=1.0, seed=42, max_tokens=24, ignore_eos=True)
    others = [
        SamplingParams(temperature=0.5 + i / 64, top_p=0.9 if i % 2 else 1.0, top_k=i % 7, max_tokens=8 + i % 20)
        for i in range(64)
    ]
    alone = ids(llm.generate(PROMPTS[0], mine, use_tqdm=False))[0]
    many = llm.generate([PROMPTS[i % 5] for i in range(64)] + [PROMPTS[0]], [*others, mine], use_tqdm=False)
    assert ids(many)[-1] == alone
    other_seed = SamplingParams(temperature=1.0, seed=43, max_tokens=24, ignore_eos=True)
    assert ids(llm.generate(PROMPTS[0], other_seed, use_tqdm=False))[0] != alone
    assert_idle(llm)


def test_chunked_prefill_prefix_cache_and_preemption_do_not_change_the_text(llm, alone, tiny_folder):
    """Another engine, whose pool holds a fraction of what runs, in steps of 16 tokens."""
    small = make_llm(
        tiny_folder, kv_cache_memory_bytes=15 * 16 * 512, max_model_len=160, max_num_batched_tokens=16, block_size=16
    )
    long = [p + " " + PROMPTS[0] * 3 for p in PROMPTS]
    expected = ids(llm.generate(long, GREEDY, use_tqdm=False))
    preempted = []
    make_room = small.engine.scheduler._preempt
    small.engine.scheduler._preempt = lambda r: (preempted.append(r.request_id), make_room(r))
    assert ids(small.generate(long, GREEDY, use_tqdm=False)) == expected
    assert preempted, "the pool was meant to be too small"
    assert ids(small.generate(PROMPTS, GREEDY, use_tqdm=False)) == alone
    assert_idle(small)


def test_prefix_cache_hits_are_counted_and_give_the_same_logprobs(llm):
    prompt = list(range(10, 110))
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=0, ignore_eos=True)
    assert llm.reset_prefix_cache()
    cold = llm.generate([prompt], params, use_tqdm=False)[0]
    warm = llm.generate([prompt], params, use_tqdm=False)[0]
    salted = llm.generate([{"prompt_token_ids": prompt, "cache_salt": "x"}], params, use_tqdm=False)[0]
    assert (cold.num_cached_tokens, warm.num_cached_tokens, salted.num_cached_tokens) == (0, 96, 0)
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids == salted.outputs[0].token_ids
    assert warm.outputs[0].cumulative_logprob == pytest.approx(cold.outputs[0].cumulative_logprob, abs=1e-4)


def test_logprobs_agree_with_prompt_logprobs(llm):
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=12, logprobs=3, ignore_eos=True)
    answer = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    prompt, output = answer.prompt_token_ids, answer.outputs[0].token_ids
    scored = llm.generate([prompt + output], SamplingParams(max_tokens=1, prompt_logprobs=3), use_tqdm=False)[
        0
    ].prompt_logprobs
    assert scored[0] is None and len(scored) == len(prompt + output)
    for token, sampled, again in zip(output, answer.outputs[0].logprobs, scored[len(prompt) :], strict=True):
        assert next(iter(sampled)) == token == next(iter(again))
        assert sampled[token].rank == again[token].rank
        assert len(sampled) in (3, 4)
        for i, entry in sampled.items():
            assert entry.logprob == pytest.approx(again[i].logprob, abs=1e-4)
    total = sum(entry[t].logprob for t, entry in zip(output, answer.outputs[0].logprobs, strict=True))
    assert answer.outputs[0].cumulative_logprob == pytest.approx(total)


def test_stop_token_eos_and_min_tokens(llm, alone):
    tokens = alone[0]
    stop = tokens[5]
    first = tokens.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[stop], ignore_eos=True)
    out = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0]
    assert (out.token_ids, out.finish_reason, out.stop_reason) == (tokens[: first + 1], "stop", stop)
    later = llm.generate(PROMPTS[0], params.with_(min_tokens=first + 3), use_tqdm=False)[0].outputs[0]
    assert stop not in later.token_ids[: first + 3] and len(later.token_ids) > first + 1
    eos = min(llm.engine.eos_token_ids or {0})
    forced = SamplingParams(temperature=0.0, max_tokens=8, allowed_token_ids=[7, eos], logit_bias={eos: 50.0})
    out = llm.generate(PROMPTS[0], forced.with_(min_tokens=3), use_tqdm=False)[0].outputs[0]
    if llm.engine.eos_token_ids:
        assert (out.token_ids, out.finish_reason, out.stop_reason) == ([7, 7, 7, eos], "stop", None)
    ignoring = llm.generate(PROMPTS[0], forced.with_(ignore_eos=True), use_tqdm=False)[0].outputs[0]
    assert (ignoring.token_ids, ignoring.finish_reason) == ([eos] * 8, "length")


def test_stop_strings_end_the_text_before_them(llm):
    full = llm.generate(PROMPTS[3], GREEDY, use_tqdm=False)[0].outputs[0]
    text = full.text
    stop = next(text[i : i + 3] for i in range(4, len(text) - 3) if text[i : i + 3].isascii() and text[i].strip())
    params = GREEDY.with_(stop=[stop])
    out = llm.generate(PROMPTS[3], params, use_tqdm=False)[0].outputs[0]
    assert out.text == text[: text.index(stop)]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert full.token_ids[: len(out.token_ids)] == out.token_ids
    kept = llm.generate(PROMPTS[3], params.with_(include_stop_str_in_output=True), use_tqdm=False)[0].outputs[0]
    assert kept.text == text[: text.index(stop) + len(stop)]
    assert_idle(llm)


def test_presence_penalty_equals_a_bias_built_by_hand(llm):
    prompt = llm.engine.tokenizer.encode(PROMPTS[1])
    penalty = 0.08  # random logits lie close together
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, presence_penalty=penalty)
    with_penalty = ids(llm.generate([prompt], params, use_tqdm=False))[0]
    by_hand: list[int] = []
    for _ in range(16):
        bias = dict.fromkeys(by_hand, -penalty)
        one = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logit_bias=bias)
        by_hand += ids(llm.generate([prompt + by_hand], one, use_tqdm=False))[0]
    assert with_penalty == by_hand
    # A neighbour without penalties is untouched, and the row's counts are gone when the slot is used again.
    both = llm.generate([prompt, prompt], [params, GREEDY], use_tqdm=False)
    assert ids(both) == [by_hand, ids(llm.generate([prompt], GREEDY, use_tqdm=False))[0]]


def test_repetition_penalty_never_repeats_when_huge(llm):
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, repetition_penalty=1e6)
    answer = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    seen = answer.prompt_token_ids + answer.outputs[0].token_ids
    assert len(set(answer.outputs[0].token_ids)) == 40
    assert not set(answer.prompt_token_ids) & set(answer.outputs[0].token_ids), seen


def test_allowed_banned_and_bad_words(llm, alone):
    allowed = [5, 300, 301]
    params = SamplingParams(temperature=1.0, max_tokens=30, allowed_token_ids=allowed, ignore_eos=True)
    assert set(ids(llm.generate(PROMPTS[0], params, use_tqdm=False))[0]) <= set(allowed)
    banned = alone[0][3]
    params = GREEDY.with_(logit_bias={banned: -100.0})
    assert banned not in ids(llm.generate(PROMPTS[0], params, use_tqdm=False))[0]

    # A bad word of two tokens: its first may come, its second not right after.
    two = SamplingParams(temperature=1.0, seed=3, max_tokens=200, allowed_token_ids=[40, 41], ignore_eos=True)
    word = llm.engine.tokenizer.decode([40, 41])
    assert llm.engine.tokenizer.encode(word) == [40, 41]
    free = ids(llm.generate(PROMPTS[0], two, use_tqdm=False))[0]
    assert (40, 41) in itertools.pairwise(free)
    bad = ids(llm.generate([PROMPTS[0], PROMPTS[1]], two.with_(bad_words=[word]), use_tqdm=False))
    for tokens in bad:
        assert (40, 41) not in itertools.pairwise(tokens)


def test_n_answers_are_different_and_repeatable(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=10, ignore_eos=True)
    first, second = (llm.generate(PROMPTS[0], params, use_tqdm=False)[0] for _ in range(2))
    assert [a.index for a in first.outputs] == [0, 1, 2]
    texts = [tuple(a.token_ids) for a in first.outputs]
    assert len(set(texts)) == 3
    assert texts == [tuple(a.token_ids) for a in second.outputs]


def test_abort_frees_everything_and_disturbs_nobody(llm, alone):
    engine = llm.engine
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(f"r{i}", engine.tokenizer.encode(prompt), GREEDY)
    got: dict[str, list[int]] = {f"r{i}": [] for i in range(5)}
    for step in range(200):
        if step == 6:
            output = engine.abort("r1")
            assert output.finished and output.outputs[0].finish_reason == "abort"
            assert engine.abort("r1") is None
        for output in engine.step():
            got[output.request_id] += output.outputs[0].token_ids
        if not engine.has_work:
            break
    assert got["r1"] == alone[1][: len(got["r1"])] and len(got["r1"]) < 24
    assert [got[f"r{i}"] for i in (0, 2, 3, 4)] == [alone[i] for i in (0, 2, 3, 4)]
    assert_idle(llm)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "prompt is empty"),
        ([1] * 600, SamplingParams(), "512 tokens.*600"),
        ([1, 640], SamplingParams(), "token id 640"),
        ([1], SamplingParams(allowed_token_ids=[-1]), "allowed_token_ids"),
        ([1], SamplingParams(logprobs=21), "max allowed: 20"),
        ([1], SamplingParams(prompt_logprobs=-1), "max allowed: 20"),
    ],
)
def test_bad_requests_are_refused_by_name(llm, prompt, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([[5, 6, 7], prompt], [GREEDY, params], use_tqdm=False)
    assert not llm.engine.has_unfinished


def test_max_tokens_is_cut_to_the_context(llm):
    out = llm.generate([[9] * 500], SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True), use_tqdm=False)
    assert len(out[0].outputs[0].token_ids) == 12 and out[0].outputs[0].finish_reason == "length"
    rest = llm.generate([[9] * 500], SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert ids(rest) == ids(out)


def test_logits_that_are_not_numbers_end_the_request_with_an_error(tiny_folder):
    broken = make_llm(tiny_folder)
    runner = broken.engine.runner
    runner.leaves = tuple(jnp.full_like(x, jnp.nan) for x in runner.leaves)
    out = broken.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in out] == ["error", "error"]
    assert ids(out) == [[], []]
    assert_idle(broken)


def test_chat_renders_the_template(llm):
    messages = [{"role": "user", "content": "Hi"}]
    out = llm.chat(messages, GREEDY, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})[0]
    assert out.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert ids(two)[0] == ids(two)[1] and len(two) == 2


def test_defaults_come_from_the_generation_config(llm):
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 20)


def test_one_compilation_a_shape(llm):
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    before = llm.engine.runner.compiles.count
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert llm.engine.runner.compiles.count == before


@pytest.mark.parametrize("tensor_parallel_size", [2, 4])
def test_tensor_parallel_gives_the_same_text(tiny_folder, llm, alone, tensor_parallel_size):
    """On fake CPU devices; with 4 devices and 2 KV heads, each head is held twice."""
    weights = tiny_folder.parent / "weights"
    if not weights.exists():
        shutil.copytree(tiny_folder, weights)
        runner = llm.engine.runner
        save_params(runner.leaves, llm.engine.model_config, weights, runner.mesh)
    split = make_llm(weights, load_format="auto", tensor_parallel_size=tensor_parallel_size)
    assert split.engine.runner.kv.sharding.num_devices == tensor_parallel_size
    assert ids(split.generate(PROMPTS, GREEDY, use_tqdm=False)) == alone


def test_structured_output_obeys_beside_free_neighbours(llm, alone):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}}}
    schema |= {"required": ["n", "ok"], "additionalProperties": False}
    wanted = [
        StructuredOutputsParams(json=schema),
        StructuredOutputsParams(choice=["red", "green"]),
        StructuredOutputsParams(regex="[0-9]{4}"),
    ]
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=120, structured_outputs=w) for i, w in enumerate(wanted)
    ]
    out = llm.generate([PROMPTS[0], *PROMPTS[:3], PROMPTS[1]], [GREEDY, *params, GREEDY], use_tqdm=False)
    value = json.loads(out[1].outputs[0].text)
    assert set(value) == {"n", "ok"} and value["n"] <= 99
    assert out[2].outputs[0].text in ("red", "green")
    assert out[3].outputs[0].text.isdigit() and len(out[3].outputs[0].text) == 4
    assert [o.outputs[0].finish_reason for o in out[1:4]] == ["stop"] * 3
    assert ids(out)[0] == alone[0] and ids(out)[4] == alone[1]
    with pytest.raises(ValueError, match="Invalid type"):
        bad = StructuredOutputsParams(json={"type": "nope"})
        llm.generate(PROMPTS[:2], [GREEDY, GREEDY.with_(structured_outputs=bad)], use_tqdm=False)
    assert_idle(llm)


def test_metrics_count_what_happened(tiny_folder):
    small = make_llm(tiny_folder)
    small.generate([[7] * 40, [7] * 40], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    small.generate([[7] * 40], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), use_tqdm=False)
    labels = {"model_name": str(tiny_folder), "engine": "0"}
    value = lambda name, **more: small.engine.metrics.registry.get_sample_value(name, labels | more)
    assert value("vllm:generation_tokens_total") == 11
    assert value("vllm:prompt_tokens_total") == value("vllm:prefix_cache_queries_total") == 120
    assert value("vllm:prefix_cache_hits_total") == 32
    assert value("vllm:request_success_total", finished_reason="length") == 3
    assert value("vllm:time_to_first_token_seconds_count") == 3
    assert value("vllm:inter_token_latency_seconds_count") == 8
    assert value("vllm:num_requests_running") == value("vllm:num_requests_waiting") == 0
    assert value("qjax:num_compiles") == small.engine.runner.compiles.count
    assert b"vllm:kv_cache_usage_perc" in small.engine.metrics.render()


@pytest.mark.parametrize("is_done", [True, False])
def test_a_step_is_late_where_the_device_had_ended_the_one_before(llm, monkeypatch, is_done):
    monkeypatch.setattr("qjax.engine.runner.InFlight.is_done", is_done)
    value = lambda name: llm.engine.metrics.registry.get_sample_value(name, {"model_name": label, "engine": "0"})
    (label,) = {sample.labels["model_name"] for m in llm.engine.metrics.registry.collect() for sample in m.samples}
    before = value("qjax:num_steps_total"), value("qjax:num_late_steps_total")
    llm.generate(PROMPTS[:1], GREEDY.with_(max_tokens=5, ignore_eos=True), use_tqdm=False)
    steps, late = value("qjax:num_steps_total") - before[0], value("qjax:num_late_steps_total") - before[1]
    assert steps >= 5 and late == (steps - 1 if is_done else 0)  # the first step follows none


def test_a_thinking_budget_closes_the_block(llm):
    messages = [{"role": "user", "content": "Hi"}]
    start, end = (llm.engine.tokenizer.encode(tag)[0] for tag in ("<think>", "</think>"))
    free = GREEDY.with_(logit_bias={end: -100.0, start: 100.0}, max_tokens=12)  # thinks for ever
    assert end not in ids(llm.chat(messages, free, use_tqdm=False))[0]
    bounded = GREEDY.with_(logit_bias={end: -100.0}, thinking_token_budget=4, max_tokens=12)
    prompt = llm.engine.tokenizer.apply_chat_template(messages) + "<think>"
    tokens = ids(llm.generate(prompt, bounded, use_tqdm=False))[0]
    assert tokens.index(end) == 4 and tokens.count(end) == 1 and len(tokens) == 12


def test_chat_can_tell_reasoning_and_tool_calls_apart(llm, monkeypatch):
    said = '<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    outputs = lambda prompts, *_, **__: [RequestOutput("0", p, [], [CompletionOutput(0, said, [])]) for p in prompts]
    monkeypatch.setattr(llm, "generate", outputs)
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    message = llm.chat(messages, tools=tools, parse=True)[0].outputs[0].message
    call = message.pop("tool_calls")[0]
    assert call.pop("id") and call == {"type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    assert message == {"role": "assistant", "content": "I look.", "reasoning": "hm", "reasoning_content": "hm"}
    closed = llm.chat(messages, chat_template_kwargs={"enable_thinking": False}, parse=True)[0].outputs[0]
    assert closed.message == {"role": "assistant", "content": said}, "thinking was off, and there are no tools"
    assert llm.chat(messages)[0].outputs[0].message is None

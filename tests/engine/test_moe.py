"""A mixture of experts from the options to the answer: offline, over HTTP, split over devices, and planned."""

import json

import numpy as np
import openai
import pytest

from qjax import LLM, SamplingParams
from qjax.config import EngineConfig
from qjax.engine.memory import Device, plan
from qjax.models.config import ModelConfig
from qjax.terminal import info
from tests.models.test_moe import LARGE
from tests.server.serving import serving
from tests.text.small_tokenizer import write_small_tokenizer
from tests.tiny import MOE, write_checkpoint

PROMPTS = [[7, 8, 9, 10], list(range(20, 60)), [300, 301]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
OPTIONS = {"kv_cache_memory_bytes": "16MiB", "max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    write_checkpoint(folder, vocab_size=640, **MOE)
    write_small_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(str(folder), **OPTIONS)


def answers(llm: LLM, prompts=PROMPTS) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, GREEDY, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(llm):
    return answers(llm)


def test_answers_are_the_same_alone_and_among_others(llm, expected):
    assert len({tuple(ids) for ids in expected}) == 3 and len(set(expected[0])) > 2
    assert [answers(llm, [prompt])[0] for prompt in PROMPTS] == expected


def test_answers_are_those_that_the_prompt_pass_gives(llm, expected):
    """Each token is the most probable one after those before it, all read as one prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    whole = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    for prompt, out in zip(PROMPTS, llm.generate(whole, params, use_tqdm=False), strict=True):
        for token, logprobs in list(zip(out.prompt_token_ids, out.prompt_logprobs, strict=True))[len(prompt) :]:
            assert logprobs[token].rank == 1


@pytest.mark.parametrize("enable_expert_parallel", [False, True])
def test_two_devices_give_the_same_answers(folder, expected, enable_expert_parallel):
    llm = LLM(str(folder), tensor_parallel_size=2, enable_expert_parallel=enable_expert_parallel, **OPTIONS)
    assert answers(llm) == expected


def test_weights_are_updated_and_made_up(llm, folder, expected):
    dummy = LLM(str(folder), load_format="dummy", **OPTIONS)
    other = answers(dummy)
    assert other != expected
    weights = dict(zip(llm.engine.runner.modeldef.paths, llm.engine.runner.leaves, strict=True))
    by_path = dict(zip(weights, dummy.engine.runner.leaves, strict=True))
    experts = np.asarray(by_path["layers.0.mlp.experts.down_proj.kernel"])
    assert abs(experts.std() / 0.02 - 1) < 0.05
    dummy.update_weights(llm.engine.runner.leaves)
    assert answers(dummy) == expected


async def test_over_http(folder, expected):
    async with serving(EngineConfig(model=str(folder), **OPTIONS), served_model_name=["moe"]) as (url, engine):
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for prompt, ids in zip(PROMPTS, expected, strict=True):
            options = {"temperature": 0, "max_tokens": len(ids), "extra_body": {"ignore_eos": True}}
            answer = await client.completions.create(model="moe", prompt=prompt, **options)
            assert answer.choices[0].text == engine.tokenizer.decode(ids)
        chat = await client.chat.completions.create(
            model="moe", messages=[{"role": "user", "content": "Hello"}], max_tokens=3
        )
        assert chat.usage.completion_tokens == 3


def test_plan_of_the_30b():
    """30.5e9 weights; a step's rows are there once for each of a token's 8 experts."""
    model = ModelConfig.from_hf(LARGE)
    sized = plan(EngineConfig(model="x", max_model_len=4096), model, Device("gpu", 130 * 2**30))
    assert sized.weights_bytes / 2**30 == pytest.approx(56.87, abs=0.01)
    assert 8192 * 8 * (2048 + 768) * 2 < sized.activation_bytes < 4 * 2**30
    half = plan(EngineConfig(model="x", max_model_len=4096, tensor_parallel_size=2), model, Device("gpu", 70 * 2**30))
    assert half.weights_bytes == sized.weights_bytes // 2
    with pytest.raises(ValueError, match=r"The model does not fit: weights 56\.87 GiB"):
        plan(EngineConfig(model="x"), model, Device("gpu", 48 * 2**30))


def test_info_says_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    info(EngineConfig(model=str(tmp_path)), gpu_memory=80 * 2**30)
    printed = capsys.readouterr().out
    assert "30.53 billion" in printed and "128 experts of 768, 8 a token (3.35 billion parameters)" in printed


def test_what_is_not_supported_is_refused_by_name(folder, tmp_path):
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide num_experts=8"):
        LLM(str(folder), enable_expert_parallel=True, tensor_parallel_size=3, **OPTIONS)
    with pytest.raises(ValueError, match="tensor_parallel_size=8 does not split num_attention_heads=4"):
        LLM(str(folder), tensor_parallel_size=8, hf_overrides={"num_attention_heads": 4}, **OPTIONS)

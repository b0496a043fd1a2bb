"""Real weights: Qwen2.5-Coder-0.5B-Instruct, in Python and over HTTP, against transformers' greedy ids.

QJAX_REAL_MODEL names its folder. tests/golden/qwen2.5-coder-0.5b.json holds five prompts with the greedy ids and
first-token log-probabilities that transformers computes of the same folder in float32 on a CPU.
"""

import json
import os
from pathlib import Path

import pytest

from qjax import LLM, EngineConfig, SamplingParams

GOLDEN = json.loads((Path(__file__).parent / "golden/qwen2.5-coder-0.5b.json").read_text())
FOLDER = os.environ.get("QJAX_REAL_MODEL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not FOLDER, reason="QJAX_REAL_MODEL does not name the folder of Qwen2.5-Coder-0.5B-Instruct"),
]
OPTIONS = {"model": FOLDER, "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 512}
MAX_LOGPROB_ERROR = 2e-3


@pytest.fixture(scope="module")
def llm():
    return LLM(**OPTIONS)


def test_greedy_ids_and_first_logprobs_equal_transformers(llm):
    prompts = []
    for case in GOLDEN:
        text = llm.get_tokenizer().apply_chat_template(case["messages"], tools=case["tools"])
        prompts.append(llm.get_tokenizer().encode(text))
        assert prompts[-1] == case["prompt_ids"]
    params = [SamplingParams(temperature=0.0, max_tokens=len(c["greedy_ids"]), logprobs=5) for c in GOLDEN]
    together = llm.generate(prompts, params, use_tqdm=False)
    for case, prompt, param, in_crowd in zip(GOLDEN, prompts, params, together, strict=True):
        alone = llm.generate([prompt], param, use_tqdm=False)[0]
        assert alone.outputs[0].token_ids == case["greedy_ids"] == in_crowd.outputs[0].token_ids
        first = alone.outputs[0].logprobs[0]
        for token_id, logprob in case["top5_first"]:
            assert first[token_id].logprob == pytest.approx(logprob, abs=MAX_LOGPROB_ERROR)


def test_the_example_of_vllm_works_with_the_import_replaced(llm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    message = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    for output in llm.generate([text], SamplingParams(temperature=0.6, top_p=0.95, top_k=20, max_tokens=32768)):
        assert output.prompt == text
        assert "Paris" in output.outputs[0].text
        assert output.outputs[0].finish_reason == "stop"


async def test_the_same_over_http_streamed_and_whole():
    from openai import AsyncOpenAI

    from tests.server.serving import serving

    async with serving(EngineConfig(**OPTIONS)) as (url, _):
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
        for case in GOLDEN:
            asked = {
                "model": FOLDER,
                "messages": case["messages"],
                "temperature": 0.0,
                "max_tokens": len(case["greedy_ids"]),
                "extra_body": {"skip_special_tokens": False, "return_token_ids": True, "repetition_penalty": 1.0},
            }
            if case["tools"]:
                asked["tools"] = case["tools"]
            expected = case["text"].removesuffix("<|im_end|>")
            whole = await client.chat.completions.create(**asked)
            assert whole.choices[0].message.content == expected
            assert whole.choices[0].token_ids == case["greedy_ids"]
            assert whole.usage.prompt_tokens == len(case["prompt_ids"])
            stream = await client.chat.completions.create(**asked, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
            assert text == expected

"""`--kv-cache-dtype fp8`: memory, answers, distance to the wide cache, the checkpoint's scales, tensor parallelism."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qjax import LLM, SamplingParams
from qjax.config import EngineConfig
from qjax.engine.memory import Device, plan
from tests.text.small_tokenizer import write_small_tokenizer
from tests.tiny import write_checkpoint

E4M3 = ml_dtypes.float8_e4m3fn
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = [list(range(3, 3 + n)) for n in (40, 37)]
SCALES = {"k": [0.25, 2.0], "v": [0.5, 4.0]}


@pytest.fixture(scope="module")
def builtin():
    options = {"max_model_len": 256, "block_size": 128, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    return {kind: LLM(kv_cache_memory_bytes="16MiB", kv_cache_dtype=kind, **options) for kind in ("auto", "fp8")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights without scales, with scales that fit, and with scales far too small."""
    root = tmp_path_factory.mktemp("kv_scales")
    for name, factor in (("plain", None), ("scaled", 1.0), ("saturated", 1e-6)):
        tensors = write_checkpoint(root / name, vocab_size=640, head_dim=64, dtype=np.float32)
        write_small_tokenizer(root / name)
        if factor is not None:
            for layer in range(2):
                for kind, values in SCALES.items():
                    scale = np.array(values, np.float32) * np.float32(factor)
                    tensors[f"model.layers.{layer}.self_attn.{kind}_scale"] = scale
            save_file(tensors, root / name / "model.safetensors")
    return root


def make(folder, **options) -> LLM:
    defaults = {"kv_cache_memory_bytes": "4MiB", "max_model_len": 128, "max_num_seqs": 1, "max_num_batched_tokens": 64}
    defaults["block_size"] = 128
    return LLM(str(folder), **{**defaults, "kv_cache_dtype": "fp8", **options})


def logprobs(llm: LLM, prompts: list) -> np.ndarray:
    """Of each prompt's own tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found = [
        p[token].logprob
        for o in outputs
        for token, p in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)
    ]
    return np.array(found)


def numbers(llm: LLM) -> np.ndarray:
    """What the cache holds, float32 [L, 2, P, K, S, H]."""
    return np.asarray(llm.engine.runner.kv).view(E4M3).astype(np.float32)


def test_twice_the_tokens_in_the_same_memory(builtin):
    model = builtin["fp8"].engine.model_config
    options = {"kv_cache_memory_bytes": 2**30, "max_model_len": 1024, "max_num_seqs": 4096, "dtype": "bfloat16"}
    options["max_num_batched_tokens"] = 4096
    wide, narrow = (plan(EngineConfig(kv_cache_dtype=k, **options), model, Device("cpu")) for k in ("auto", "fp8"))
    assert (wide.kv_dtype, narrow.kv_dtype) == ("bfloat16", "uint8") and narrow.dtype == "bfloat16"
    assert narrow.num_pages == 2 * wide.num_pages
    assert "KV cache (fp8_e4m3): " in narrow.table() and "fp8" not in wide.table()
    engine = builtin["fp8"].engine
    assert engine.runner.kv.nbytes == engine.plan.kv_bytes


def test_answers_of_the_builtin_model(builtin):
    """A sum, thought about digit by digit, and a fact come out as with the wide cache."""
    questions = ["What is 17 + 25?", "What is the capital of France?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    params = SamplingParams(temperature=0.0, max_tokens=120)
    texts = [o.outputs[0].text for o in builtin["fp8"].chat(chats, params, use_tqdm=False)]
    assert texts[0].endswith("17 + 25 = 42") and "Paris" in texts[1]


def test_logprobs_are_near_those_of_the_wide_cache(builtin):
    """Of real weights, but few (9 million), and logprobs down to -20: 0.2 on average."""
    prompts = ["The capital of France is Paris, and 17 + 25 = 42.", "def add(a, b):\n    return a + b\n"]
    wide, narrow = (logprobs(builtin[kind], prompts) for kind in ("auto", "fp8"))
    difference = np.abs(wide - narrow)
    assert 0 < difference.mean() < 0.25 and difference.max() < 1.5


def test_prefix_cache(folders):
    """What was found in the cache gives the text that was computed without it."""
    llm = make(folders / "plain", block_size=16)
    shared = list(range(3, 60))
    first, again = (llm.generate([[*shared, 7, 8, 9]], GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert first.num_cached_tokens == 0 and again.num_cached_tokens >= 48
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_scales_of_the_checkpoint(folders):
    """The cache holds keys / k_scale and values / v_scale of each head, and the text is that of scales of 1."""
    plain, scaled, saturated = (make(folders / name) for name in ("plain", "scaled", "saturated"))
    assert not plain.engine.model_config.kv_scales and scaled.engine.model_config.kv_scales
    texts = [[o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] for llm in (plain, scaled)]
    assert texts[0] == texts[1]
    ones, others = numbers(plain), numbers(scaled) * np.array([SCALES["k"], SCALES["v"]])[:, None, :, None, None]
    is_normal = (np.abs(ones) >= 2**-4) & (np.abs(ones) <= 64)  # in the other cache, too
    is_normal[1:] = False  # the second layer's inputs differ a little already
    assert is_normal.sum() > 5000 and np.array_equal(ones[is_normal], others[is_normal])
    saturated.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert np.abs(numbers(saturated)).max() == 448  # and no NaN


def test_scales_of_a_cache_that_is_not_fp8_are_not_used(folders):
    plain, scaled = (make(folders / name, kv_cache_dtype="auto") for name in ("plain", "saturated"))
    assert np.array_equal(logprobs(plain, PROMPTS), logprobs(scaled, PROMPTS))


@pytest.mark.parametrize("tensor_parallel_size", [2, 4])
def test_tensor_parallel(folders, tensor_parallel_size):
    """With 4 devices and 2 KV heads, each head and its scale is held twice."""
    alone = logprobs(make(folders / "scaled"), PROMPTS)
    split = make(folders / "scaled", tensor_parallel_size=tensor_parallel_size)
    np.testing.assert_allclose(logprobs(split, PROMPTS), alone, atol=2e-2)
    assert split.engine.runner.kv.sharding.num_devices == tensor_parallel_size


def test_other_dtypes_are_refused():
    for value in ("fp8_e5m2", "int8", "bfloat16"):
        with pytest.raises(ValueError, match=r"kv_cache_dtype.*auto.*fp8.*fp8_e4m3"):
            EngineConfig(kv_cache_dtype=value)
    assert EngineConfig(kv_cache_dtype="fp8_e4m3").kv_cache_dtype == "fp8_e4m3"

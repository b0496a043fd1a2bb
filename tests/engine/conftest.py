"""A tiny Qwen3 with random weights and a real (small) tokenizer, as a Hugging Face folder."""

import json

import pytest

from qjax import LLM
from tests.text.small_tokenizer import write_small_tokenizer

# Float32 and small: a step takes a millisecond, and greedy ties do not happen.
TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_qwen3")
    write_small_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [488, 486], "temperature": 0.6, "top_p": 0.95, "top_k": 20})
    )
    return folder


def make_llm(folder, **options):
    """An engine on the tiny model; the weights depend on `seed` (0) alone."""
    defaults = {
        "load_format": "dummy",
        "kv_cache_memory_bytes": "4MiB",
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
    }
    return LLM(str(folder), **(defaults | options))


@pytest.fixture(scope="session")
def llm(tiny_folder):
    return make_llm(tiny_folder)

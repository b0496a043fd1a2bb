"""Random checkpoints of any size in Hugging Face's layout, written without a line of qjax."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
GENERATION = {"do_sample": True, "eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def write_checkpoint(
    folder: Path, *, num_files: int = 1, dtype: Any = ml_dtypes.bfloat16, seed: int = 0, **config: Any
) -> dict[str, np.ndarray]:
    """Writes config.json, generation_config.json and the weights; `config` replaces fields of `TINY`.

    Returns the tensors, under their names in the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = TINY | config
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2))
    rng = np.random.default_rng(seed)
    tensors = {name: _random(rng, name, shape).astype(dtype) for name, shape in shapes(config).items()}
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    weight_map = {name: i * num_files // len(tensors) + 1 for i, name in enumerate(tensors)}
    names = {i: f"model-{i:05}-of-{num_files:05}.safetensors" for i in range(1, num_files + 1)}
    for i, file in names.items():
        save_file({name: tensors[name] for name in tensors if weight_map[name] == i}, folder / file)
    index = {"metadata": {}, "weight_map": {name: names[i] for name, i in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's tensors of a Qwen3, or as `architectures` says a Qwen2 or a Qwen3-MoE (all layers sparse)."""
    D, F, V, H = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    N, K = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    is_qwen2 = "Qwen2ForCausalLM" in config["architectures"]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (V, D)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        out |= {f"{p}.input_layernorm.weight": (D,), f"{p}.post_attention_layernorm.weight": (D,)}
        out |= {f"{p}.self_attn.{x}_proj.weight": (size, D) for x, size in (("q", N), ("k", K), ("v", K))}
        out[f"{p}.self_attn.o_proj.weight"] = (D, N)
        feed_forwards = {f"{p}.mlp": F}
        if "Qwen3MoeForCausalLM" in config["architectures"]:
            out[f"{p}.mlp.gate.weight"] = (config["num_experts"], D)
            feed_forwards = {
                f"{p}.mlp.experts.{e}": config["moe_intermediate_size"] for e in range(config["num_experts"])
            }
        for owner, size in feed_forwards.items():
            out |= {f"{owner}.gate_proj.weight": (size, D), f"{owner}.up_proj.weight": (size, D)}
            out[f"{owner}.down_proj.weight"] = (D, size)
        if not is_qwen2:
            out |= {f"{p}.self_attn.{x}_norm.weight": (H,) for x in "qk"}
        if is_qwen2 or config["attention_bias"]:
            out |= {f"{p}.self_attn.{x}_proj.bias": (size,) for x, size in (("q", N), ("k", K), ("v", K))}
        if not is_qwen2 and config["attention_bias"]:
            out[f"{p}.self_attn.o_proj.bias"] = (D,)
    return out


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape, np.float32)
    return 1 + 0.2 * noise if "norm" in name else (0.3 if name.endswith("bias") else 0.15) * noise

"""Makes tests/golden: tiny random checkpoints and what transformers computes from them.

Runs where torch and transformers are installed, neither of which qjax needs: `python scripts/make_golden.py`.
Weights are stored in bfloat16, logits computed in float32 from exactly those weights.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
SEED = 20240607
NUM_TOKENS = 40
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 160, "head_dim": 16}
MODELS = {  # name → (transformers' model type, what differs from SHAPE)
    "tied_gqa2": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "untied_gqa4": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "gqa8": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gqa1_bias": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True}),
    "yarn": (
        "qwen3",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": YARN},
    ),
    "qwen2": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
}

# Rotary embedding alone, at positions up to the longest a Qwen3 serves; the shapes of Qwen3-8B.
POSITIONS = [0, 1, 2, 63, 1000, 4095, 32767, 32768, 40959, 65535, 100_003, 131_071]
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "yarn4": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_betas": {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 16384,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attention_factor": 0.75,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32768,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
    },
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every one shows in the logits; all are bfloat16 numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = 1 + 0.2 * noise
            elif name.endswith("bias"):
                value = 0.3 * noise
            else:
                value = 0.15 * noise
            parameter.copy_(value.to(torch.bfloat16))


def model_golden(name: str, index: int) -> dict[str, np.ndarray]:
    kind, changes = MODELS[name]
    config = transformers.AutoConfig.for_model(
        kind, **{**SHAPE, "max_position_embeddings": 512, "rope_theta": 10_000.0, "eos_token_id": 1, **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    randomize(model, SEED + index)
    ids = torch.randint(0, config.vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(index))
    with torch.no_grad():
        logits = model(ids).logits[0]
    folder = GOLDEN / name
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return {f"{name}.token_ids": ids[0].numpy().astype(np.int32), f"{name}.logits": logits.numpy()}


def rope_golden(name: str) -> dict[str, np.ndarray]:
    config = transformers.Qwen3Config(
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_theta": 1_000_000.0, **ROPES[name]},
    )
    rope = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(config)
    cos, sin = rope(torch.zeros(1, dtype=torch.float32), torch.tensor([POSITIONS]))
    return {f"rope.{name}": np.stack([cos[0, :, :64].numpy(), sin[0, :, :64].numpy()])}


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {"rope.positions": np.array(POSITIONS, np.int32)}
    for index, name in enumerate(MODELS):
        arrays |= model_golden(name, index)
    for name in ROPES:
        arrays |= rope_golden(name)
    np.savez_compressed(GOLDEN / "expected.npz", **arrays)
    made_with = {
        "seed": SEED,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "models": list(MODELS),
        "ropes": ROPES,
    }
    (GOLDEN / "made_with.json").write_text(json.dumps(made_with, indent=2) + "\n")


if __name__ == "__main__":
    main()

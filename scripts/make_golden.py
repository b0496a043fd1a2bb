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
EXPERTS = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96}
EXPERTS |= {"moe_intermediate_size": 16}
MOE_MODELS = {
    # Layers 0 and 2 are dense by the step, 3 by its number; 1 is sparse.
    "moe_mixed": {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
    | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "moe_sparse": {"num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": False, "tie_word_embeddings": True}
    | {"router_aux_loss_coef": 0.1},
}
EQUAL_EXPERTS, UNCHOSEN_EXPERT = [(3, 5), (9, 2)], 7  # of moe_sparse

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


def edit_experts(model: torch.nn.Module) -> None:
    """Pairs that are equal in router and weights, so that either may be chosen, and one that no token is sent to."""
    with torch.no_grad():
        for layer in model.model.layers:
            router, experts = layer.mlp.gate.weight, layer.mlp.experts
            for one, other in EQUAL_EXPERTS:
                for weight in (router, experts.gate_up_proj, experts.down_proj):
                    weight[other] = weight[one]
            router[UNCHOSEN_EXPERT] = 0  # one of the other logits is above 0 for every token


def moe_golden(name: str, index: int) -> dict[str, np.ndarray]:
    """With the loss of training, the load-balancing loss in it, and the gradient's norm.

    The last token has no next one: in training it is no input, so the load-balancing loss leaves it out.
    """
    ids, out = golden_of(name, index, "qwen3_moe", EXPERTS | MOE_MODELS[name], name == "moe_sparse")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, dtype=torch.float32, attn_implementation="eager"
    )
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    trained = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    trained.loss.backward()
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    out |= {f"{name}.loss": trained.loss.detach().numpy(), f"{name}.aux_loss": trained.aux_loss.detach().numpy()}
    return out | {f"{name}.grad_norm": np.float32(sum(squares) ** 0.5)}


def model_golden(name: str, index: int) -> dict[str, np.ndarray]:
    return golden_of(name, index, *MODELS[name])[1]


def golden_of(
    name: str, index: int, kind: str, changes: dict, is_edited: bool = False
) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Token ids [1, T] and the arrays expected of a random model; writes its checkpoint."""
    config = transformers.AutoConfig.for_model(
        kind, **{**SHAPE, "max_position_embeddings": 512, "rope_theta": 10_000.0, "eos_token_id": 1, **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    randomize(model, SEED + index)
    if is_edited:
        edit_experts(model)
    ids = torch.randint(0, config.vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(index))
    with torch.no_grad():
        logits = model(ids).logits[0]
    folder = GOLDEN / name
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    out = {f"{name}.token_ids": ids[0].numpy().astype(np.int32), f"{name}.logits": logits.numpy()}
    return ids, out


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
    moe = {key: array for i, name in enumerate(MOE_MODELS) for key, array in moe_golden(name, 100 + i).items()}
    np.savez_compressed(GOLDEN / "moe.npz", **moe)
    made_with = {
        "seed": SEED,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "models": list(MODELS),
        "moe_models": list(MOE_MODELS),
        "ropes": ROPES,
    }
    (GOLDEN / "made_with.json").write_text(json.dumps(made_with, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Checks the engine's logits on a GPU against transformers, on random weights of a published shape.

    python scripts/check_gpu.py --config FOLDER --work FOLDER [--tokens 512]

Two processes, one after the other, as each fills the GPU: qjax makes the weights, saves them as a Hugging Face
checkpoint, loads that again and computes logits (prefill in two chunks, then token by token); transformers computes
the same in bfloat16 and, as the truth both are measured by, in float32. Needs torch and transformers beside qjax.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

NUM_DECODES = 16  # last tokens, computed one at a time


def qjax_logits(config_folder: Path, work: Path, num_tokens: int) -> None:
    import jax
    import jax.numpy as jnp

    from qjax.checkpoint.safetensors import dummy_params, load_params, save_params
    from qjax.models.batch import Batch, DecodeMetadata, PrefillMetadata
    from qjax.models.config import ModelConfig
    from qjax.models.qwen3 import abstract_model, merge
    from qjax.sharding import kv_cache_sharding, make_mesh

    config = ModelConfig.from_hf(json.loads((config_folder / "config.json").read_text()))
    mesh = make_mesh(1)
    modeldef, abstract = abstract_model(config, jnp.bfloat16, mesh)
    if not (work / "model.safetensors").exists():
        work.mkdir(parents=True, exist_ok=True)
        shutil.copy(config_folder / "config.json", work)
        started = time.perf_counter()
        leaves = trained_scale(dummy_params(abstract, modeldef), modeldef, config.num_hidden_layers)
        jax.block_until_ready(leaves)
        print(f"random weights made in {time.perf_counter() - started:.1f} s", flush=True)
        started = time.perf_counter()
        save_params(leaves, config, work, mesh)
        print(f"saved in {time.perf_counter() - started:.1f} s", flush=True)
        del leaves
    started = time.perf_counter()
    leaves = load_params(work, config, mesh, jnp.bfloat16, progress=False)
    jax.block_until_ready(leaves)
    print(f"loaded in {time.perf_counter() - started:.1f} s", flush=True)

    size = 64
    num_pages = -(-num_tokens // size)
    shape = (config.num_hidden_layers, 2, num_pages + 2, config.num_key_value_heads, size, config.head_dim)
    kv = jax.jit(lambda: jnp.full(shape, jnp.nan, jnp.bfloat16), out_shardings=kv_cache_sharding(mesh))()
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.permutation(num_pages) + 1, jnp.int32)
    ids = jnp.asarray(token_ids(config.vocab_size, num_tokens))

    def run(leaves, kv, start, count, decode):
        positions = start + jnp.arange(count)
        slots = pages[positions // size] * size + positions % size
        lens = jnp.full((1,), start + count, jnp.int32)
        meta = (
            (DecodeMetadata(pages[None], lens), None)
            if decode
            else (None, PrefillMetadata(pages[None], lens, jnp.array([0, count], jnp.int32)))
        )
        tokens = jax.lax.dynamic_slice(ids, (start,), (count,))
        model = merge(modeldef, leaves)
        hidden, kv = model(Batch(tokens, positions, slots, *meta), kv)
        return model.logits(hidden), kv

    run = jax.jit(run, static_argnums=(3, 4), donate_argnums=1)
    with jax.set_mesh(mesh):
        parts, start = [], 0
        for count in (num_tokens // 3, num_tokens - NUM_DECODES - num_tokens // 3):
            logits, kv = run(leaves, kv, start, count, False)
            parts.append(np.asarray(logits))
            start += count
        for start in range(num_tokens - NUM_DECODES, num_tokens):
            logits, kv = run(leaves, kv, start, 1, True)
            parts.append(np.asarray(logits))
    np.save(work / "qjax.npy", np.concatenate(parts))


def trained_scale(leaves, modeldef, num_layers: int):
    """Random weights of a trained model's proportions: the residual stream outweighs what each layer adds to it.

    With plain normal(0.02) weights each layer's rounding is amplified by the next, and bfloat16 is 5 % away from
    float32 in any implementation (in transformers too), which would hide an error of 1 %.
    """
    scale = {"embed_tokens": 50.0, "o_proj": (2 * num_layers) ** -0.5, "down_proj": (2 * num_layers) ** -0.5}
    factor = lambda path: next((value for name, value in scale.items() if name in path), 1.0)
    return tuple(leaf * factor(path) for leaf, path in zip(leaves, modeldef.paths, strict=True))


def transformers_logits(work: Path, num_tokens: int) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    vocab = json.loads((work / "config.json").read_text())["vocab_size"]
    ids = torch.tensor(token_ids(vocab, num_tokens).astype(np.int64))[None].cuda()

    def run(dtype):
        model = AutoModelForCausalLM.from_pretrained(work, dtype=dtype).cuda().eval()
        with torch.no_grad():
            out = model(ids).logits[0].float()
        del model
        torch.cuda.empty_cache()
        return out

    torch.backends.cuda.matmul.allow_tf32 = False
    theirs, truth = run(torch.bfloat16), run(torch.float32)
    ours = torch.from_numpy(np.load(work / "qjax.npy")).cuda()
    error = lambda a, b: ((a - b).norm() / b.norm()).item()
    same = lambda a, b: (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    top = truth.topk(2, dim=-1).values
    noise = (theirs - truth).abs().mean().item()
    clear = (top[:, 0] - top[:, 1]) > 8 * noise  # positions whose best token bf16 rounding cannot change
    return {
        "device": torch.cuda.get_device_name(0),
        "tokens": num_tokens,
        "relative_error_qjax_vs_transformers_bf16": error(ours, theirs),
        "relative_error_qjax_bf16_vs_float32": error(ours, truth),
        "relative_error_transformers_bf16_vs_float32": error(theirs, truth),
        "relative_error_decoded_positions": error(ours[-NUM_DECODES:], truth[-NUM_DECODES:]),
        "same_top1_qjax_vs_transformers_bf16": same(ours, theirs),
        "same_top1_qjax_vs_float32": same(ours, truth),
        "same_top1_transformers_bf16_vs_float32": same(theirs, truth),
        "clear_positions": clear.float().mean().item(),
        "same_top1_at_clear_positions": same(ours[clear], theirs[clear]),
    }


def token_ids(vocab_size: int, num_tokens: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, num_tokens, dtype=np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint is written (16 GB for 8B)")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--part", choices=("qjax", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "qjax":
        qjax_logits(args.config, args.work, args.tokens)
    elif args.part == "transformers":
        print("LOGITS " + json.dumps(transformers_logits(args.work, args.tokens)), flush=True)
    else:
        for part in ("qjax", "transformers"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], check=True)


if __name__ == "__main__":
    main()

"""Makes tests/golden/pooling.npz: embeddings and scores of the golden checkpoints, as transformers computes them.

Runs where torch and transformers are installed, neither of which qjax needs: `python scripts/make_pooling_golden.py`
after `make_golden.py`. The arithmetic is that of the model cards of Qwen3-Embedding (last token, length 1) and of
Qwen3-Reranker (log-softmax over the logits of "no" and "yes").
"""

from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
MODELS = ("tied_gqa2", "untied_gqa4")
LENGTHS = (1, 2, 15, 16, 17, 40, 63, 100)
NO, YES = 17, 42  # any two tokens of these small vocabularies


def golden(name: str) -> dict[str, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
    model.eval()
    generator = torch.Generator().manual_seed(7)
    out: dict[str, np.ndarray] = {}
    embeddings, scores = [], []
    for length in LENGTHS:
        ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
        with torch.no_grad():
            last = model.model(ids).last_hidden_state[:, -1]
            logits = model(ids).logits[:, -1]
        embeddings.append(torch.nn.functional.normalize(last, p=2, dim=1)[0].numpy())
        both = torch.stack([logits[:, NO], logits[:, YES]], dim=1)
        scores.append(torch.nn.functional.log_softmax(both, dim=1)[:, 1].exp().item())
        out[f"{name}.ids.{length}"] = ids[0].numpy().astype(np.int32)
    return out | {f"{name}.embeddings": np.stack(embeddings), f"{name}.scores": np.array(scores, np.float32)}


def main() -> None:
    arrays = {"lengths": np.array(LENGTHS), "tokens": np.array([NO, YES])}
    for name in MODELS:
        arrays |= golden(name)
    np.savez_compressed(GOLDEN / "pooling.npz", **arrays)


if __name__ == "__main__":
    main()

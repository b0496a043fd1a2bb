"""The least time a GPU needs for a figure: its bytes at the rate it reads, or its products at the rate it computes.

The one place that counts bytes and operations. Counted are the weights that a step multiplies with (once a step), the
keys and values that attention reads, and all products; not counted are activations, launches, sampling and the host.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from qjax.models.config import ModelConfig
from qjax.quantization.config import Quantization
from scripts.bench_common import random_requests

ITEMSIZE = 2  # of activations, keys and values, and of weights that are not quantised


@dataclass(frozen=True)
class Peaks:
    """What was measured on the card: reading, and a large bf16 product."""

    bytes_per_s: float
    flops_per_s: float


PEAKS = {"H100": Peaks(3.0e12, 798e12), "H200": Peaks(4.3e12, 798e12)}


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )


MODELS = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40, False),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64, False),
}
MODELS |= {
    f"{name}-{method.upper()}": replace(model, quantization=Quantization(method))
    for name, model in list(MODELS.items())
    for method in ("fp8", "awq")
}


@dataclass(frozen=True)
class Work:
    """Bytes read and operations done."""

    bytes: float
    flops: float

    def seconds(self, peaks: Peaks) -> float:
        return max(self.bytes / peaks.bytes_per_s, self.flops / peaks.flops_per_s)


def peaks_of(device: str | None) -> Peaks | None:
    """Of a device by its name; None: nothing was measured there."""
    return next((peaks for name, peaks in PEAKS.items() if name in (device or "")), None)


def weights_read(model: ModelConfig) -> int:
    """Bytes of weights that a step reads: all but the input embedding, of which it reads a row a token."""
    return model.weights_bytes(ITEMSIZE) - _embedding(model) * ITEMSIZE


def weights_flops(model: ModelConfig) -> int:
    """Operations that a token's products take, quantised or not."""
    return 2 * (model.num_params - _embedding(model))


def _embedding(model: ModelConfig) -> int:
    """Parameters that are only looked up."""
    return 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size


def decode_step(model: ModelConfig, contexts: list[float]) -> Work:
    """One new token for each sequence; `contexts`: tokens of each."""
    total = sum(contexts)
    num_bytes = weights_read(model) + total * model.kv_bytes_per_token(ITEMSIZE)
    return Work(num_bytes, weights_flops(model) * len(contexts) + _attention_flops(model, total))


def prompts(model: ModelConfig, lengths: list[int]) -> Work:
    """Prompts from their first token on, up to a sampled token each; the weights are read once."""
    head = 2 * model.vocab_size * model.hidden_size
    layers = weights_flops(model) - head
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    flops = layers * sum(lengths) + head * len(lengths) + _attention_flops(model, pairs)
    return Work(weights_read(model), flops)


def _attention_flops(model: ModelConfig, pairs: float) -> float:
    """Of a query and a key: its product, and the value's."""
    return 4 * model.num_attention_heads * model.head_dim * model.num_hidden_layers * pairs


def answers(model: ModelConfig, in_lens: list[int], out_lens: list[int], peaks: Peaks) -> float:
    """Seconds for requests that all come at once: their prompts, then every step with all that are not at their end."""
    seconds = prompts(model, in_lens).seconds(peaks)
    for step in range(1, max(out_lens)):
        contexts = [n + step for n, out in zip(in_lens, out_lens, strict=True) if step < out]
        seconds += decode_step(model, contexts).seconds(peaks)
    return seconds


def least_seconds(model: ModelConfig, figure: str, peaks: Peaks) -> float | None:
    """Of what a figure counts: a step, a prompt, all requests. None: it is not bound by the GPU, or not known."""
    parts = re.match(r"([a-z_]+?)_", figure)
    n = [int(x) for x in re.findall(r"\d+", figure)]
    match parts and parts[1]:
        case "decode" | "sampled" if re.fullmatch(r"(decode|sampled)_b\d+_in\d+_out\d+", figure):
            batch, in_len, out_len = n
            return decode_step(model, [in_len + out_len / 2] * batch).seconds(peaks)
        case "long":
            return decode_step(model, [n[1]] * n[0]).seconds(peaks)
        case "ttft":
            return prompts(model, [n[1]]).seconds(peaks)
        case "prefill":
            return prompts(model, [n[1]] * n[0]).seconds(peaks)
        case "throughput":
            token_ids, out_lens = random_requests(n[0])
            return answers(model, [len(ids) for ids in token_ids], out_lens, peaks)
        case "burst":
            return answers(model, [n[1]] * n[0], [n[2]] * n[0], peaks)
    return None


def share_of_floor(line: dict[str, Any], device: str | None) -> float | None:
    """How much of the time of a line's figure the floor is, up to 1."""
    model, peaks = MODELS.get(line["model"]), peaks_of(device)
    seconds = seconds_of(line)
    if model is None or peaks is None or seconds is None or line.get("kv", "bf16") != "bf16" or line.get("tp", 1) != 1:
        return None
    method = "bf16" if model.quantization is None else model.quantization.method
    # Products of prompts have no floor here where they are computed in another dtype, whose rate was not measured.
    if line.get("dtype") != method or (model.quantization and not line["figure"].startswith(("decode", "sampled"))):
        return None
    least = least_seconds(model, line["figure"], peaks)
    return None if least is None else least / seconds


def seconds_of(line: dict[str, Any]) -> float | None:
    """What one of the thing counted took: a step, a token of batch 1, a prompt's answer, all requests."""
    for key, unit in (("ms_per_step", 1e3), ("ms_per_token", 1e3), ("ms", 1e3), ("seconds", 1.0)):
        if key in line:
            return line[key] / unit
    return None


def step_floors(model: ModelConfig, batch: int, context: float, peaks: Peaks) -> dict[str, float]:
    """Seconds of the kinds of kernels in a decode step, as `profile_table.KINDS` names them."""
    kv_bytes = batch * context * model.kv_bytes_per_token(ITEMSIZE)
    return {"products": weights_read(model) / peaks.bytes_per_s, "attention": kv_bytes / peaks.bytes_per_s}

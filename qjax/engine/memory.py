"""The memory plan: what the weights, a step and the KV cache take, worked out from `config.json` before loading.

Every size and limit that an option leaves open is decided here, once. No jax: `qjax info` plans without a device.
"""

from dataclasses import dataclass

from qjax.config import EngineConfig
from qjax.models.config import ModelConfig

GIB = 2**30
ITEMSIZE = {"bfloat16": 2, "float32": 4, "uint8": 1}
CPU_KV_BYTES = 2 * GIB
GPU_RESERVE_BYTES = GIB // 2  # GEMM workspaces, compiled code's constants, fragmentation
MAX_PREFILLS = 64  # chunks of prompts in one step
GPU_BYTES_PER_MS = 3e9  # that an H100 reads
STAGED_LOADS = 32  # KV pages on their way from the host to the devices at a time
HOST_MS = 4  # that the host takes for a step of many requests: a shorter one would wait for it


@dataclass(frozen=True)
class Device:
    """What the plan must know of the devices. `memory_bytes`: what qjax may take of each; None: not limited (CPU)."""

    platform: str  # "gpu" or "cpu"
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """Sizes and limits of an engine. Bytes are per device."""

    is_gpu: bool
    dtype: str
    kv_dtype: str  # of the KV cache; uint8: the bits of e4m3
    page_size: int  # S
    num_pages: int  # P, the null page included
    max_model_len: int
    max_context_len: int  # of the model
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_prefills: int
    num_scheduler_steps: int
    weights_bytes: int
    activation_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    budget_bytes: int | None
    num_host_pages: int = 0  # of all devices together, in the host's memory (--kv-offloading-size)
    host_page_bytes: int = 0

    num_staged_pages: int = 0  # that are on their way there at a time

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.max_model_len // self.page_size)

    @property
    def kv_capacity_tokens(self) -> int:
        return (self.num_pages - 1) * self.page_size

    @property
    def longest_context(self) -> int:
        """The highest --max-model-len of this model and this memory."""
        return min(self.max_context_len, self.kv_capacity_tokens)

    def table(self) -> str:
        """The lines that start-up prints before loading."""
        total = self.weights_bytes + self.activation_bytes + self.kv_bytes
        of_dtype = " (fp8_e4m3)" if self.kv_dtype == "uint8" else ""
        of = f" of {self.budget_bytes / GIB:.2f}" if self.budget_bytes is not None else ""
        return (
            f"memory plan ({'GPU' if self.is_gpu else 'CPU'}, {self.dtype}, GiB a device): "
            f"weights {self.weights_bytes / GIB:.2f} + activations {self.activation_bytes / GIB:.2f} "
            f"+ KV cache {self.kv_bytes / GIB:.2f} = {total / GIB:.2f}{of}\n"
            f"KV cache{of_dtype}: {self.num_pages - 1} pages of {self.page_size} tokens = "
            f"{self.kv_capacity_tokens} tokens, "
            f"{self.kv_capacity_tokens / self.max_model_len:.1f} requests of the full length of {self.max_model_len}; "
            f"the longest context that fits: {self.longest_context}; "
            f"up to {self.max_num_seqs} requests at a time, {self.max_num_batched_tokens} tokens a step"
            + (f"\n{self._host_line()}" if self.num_host_pages else "")
        )

    def _host_line(self) -> str:
        size = self.num_host_pages * self.host_page_bytes / GIB
        return f"KV cache in the host's memory: {self.num_host_pages} pages = {size:.2f} GiB"


def plan(config: EngineConfig, model: ModelConfig, device: Device) -> Plan:
    """Decides every open size.

    Raises:
      ValueError: the model or one request of `max_model_len` does not fit; the message has the numbers and the option
        values that would.
    """
    is_gpu = device.platform != "cpu"
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if is_gpu else "float32")
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else "uint8"
    page_size = config.block_size or (64 if is_gpu else 16)
    tp = config.tensor_parallel_size
    max_num_seqs = config.max_num_seqs or (256 if is_gpu else 32)
    max_num_batched_tokens = config.max_num_batched_tokens or (8192 if is_gpu else 1024)
    if max_num_batched_tokens < max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens={max_num_batched_tokens} is less than max_num_seqs={max_num_seqs}: "
            "each running request takes one token of a step."
        )
    weights = model.weights_bytes(ITEMSIZE[dtype]) // tp
    activations = _activation_bytes(model, ITEMSIZE[dtype], tp, max_num_seqs, max_num_batched_tokens)
    # With more devices than KV heads, each head is kept on several devices.
    per_token = model.kv_bytes_per_token(ITEMSIZE[kv_dtype]) * max(tp // model.num_key_value_heads, 1) // tp

    num_host_pages, staged = 0, 0
    if config.kv_offloading_size is not None:
        num_host_pages = int(config.kv_offloading_size * GIB) // (per_token * page_size * tp)
        if num_host_pages < 1:
            raise ValueError(
                f"kv_offloading_size={config.kv_offloading_size} GiB holds no page of the KV cache, "
                f"{per_token * page_size * tp} bytes: raise it."
            )
        staged = max_num_batched_tokens // page_size + 8  # what a step of prompts completes; more waits for the next
        if is_gpu:
            activations += (staged + STAGED_LOADS) * page_size * per_token

    budget = device.memory_bytes
    kv = config.kv_cache_memory_bytes
    if kv is None:
        kv = CPU_KV_BYTES if budget is None else budget - weights - activations
    if (budget is not None and weights + activations + kv > budget) or kv < 2 * per_token * page_size:
        raise ValueError(
            f"The model does not fit: weights {weights / GIB:.2f} GiB + activations {activations / GIB:.2f} GiB "
            f"+ KV cache {max(kv, 0) / GIB:.2f} GiB on a device with {(budget or 0) / GIB:.2f} GiB for qjax. "
            "Raise --gpu-memory-utilization, lower --max-num-batched-tokens or --kv-cache-memory-bytes, or spread the "
            "model with --tensor-parallel-size."
        )
    num_pages = kv // (per_token * page_size)
    capacity = (num_pages - 1) * page_size
    wanted = config.max_model_len
    auto = min(model.max_context_len, capacity)
    max_model_len = auto if wanted == "auto" else wanted or model.max_context_len
    if max_model_len > model.max_context_len:
        raise ValueError(
            f"max_model_len={max_model_len} is more than the {model.max_context_len} tokens of the model. Lower "
            "--max-model-len, or extend the context with --rope-scaling "
            '\'{"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":32768}\'.'
        )
    if max_model_len > capacity:
        raise ValueError(
            f"One request of max_model_len={max_model_len} tokens needs {max_model_len * per_token / GIB:.2f} GiB of "
            f"KV cache; there are {kv / GIB:.2f} GiB, which hold {capacity} tokens. Use --max-model-len {capacity} (or "
            f"auto), or --kv-cache-memory-bytes {(max_model_len + 2 * page_size) * per_token}"
            + (", or a higher --gpu-memory-utilization." if is_gpu else ".")
        )
    # More pages than all requests at their longest could ever fill would be memory for nothing.
    num_pages = min(num_pages, max_num_seqs * -(-max_model_len // page_size) + 1)
    return Plan(
        is_gpu=is_gpu,
        dtype=dtype,
        kv_dtype=kv_dtype,
        page_size=page_size,
        num_pages=num_pages,
        max_model_len=max_model_len,
        max_context_len=model.max_context_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_prefills=min(MAX_PREFILLS, max_num_seqs),
        num_scheduler_steps=config.num_scheduler_steps or (_num_scheduler_steps(weights) if is_gpu else 1),
        weights_bytes=weights,
        activation_bytes=activations,
        kv_bytes=num_pages * page_size * per_token,
        kv_bytes_per_token=per_token,
        budget_bytes=budget,
        num_host_pages=num_host_pages,
        host_page_bytes=per_token * page_size * tp,
        num_staged_pages=staged,
    )


def _num_scheduler_steps(weights_bytes: int) -> int:
    """As many as keep the device busy for HOST_MS, as far as the weights decide that; 4 at most."""
    return next((n for n in (1, 2) if n * weights_bytes / GPU_BYTES_PER_MS >= HOST_MS), 4)


def _activation_bytes(model: ModelConfig, itemsize: int, tp: int, max_num_seqs: int, num_tokens: int) -> int:
    """An upper estimate of a step's temporaries and of the per-request state, on one device."""
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    feed_forward = model.intermediate_size if model.num_sparse_layers < model.num_hidden_layers else 0
    layer = num_tokens * (6 * model.hidden_size + (2 * heads + 4 * feed_forward) // tp) * itemsize
    if model.num_sparse_layers:  # rows sorted by expert, with padding, and the experts' work on them
        rows = num_tokens * model.num_experts_per_tok + 128 * min(model.num_experts, num_tokens)
        parts = 1 if model.expert_parallel else tp
        layer += rows * (3 * model.hidden_size + 3 * model.moe_intermediate_size // parts) * itemsize
    logits = 4 * (max_num_seqs + MAX_PREFILLS) * model.vocab_size * 4
    if model.quantization is not None:  # the largest weight's numbers, of this layer and the next
        layer += 2 * 2 * model.hidden_size * model.intermediate_size * itemsize // tp
    counts = 3 * max_num_seqs * model.vocab_size  # TokenCounts, made when the first request has penalties
    return layer + logits + counts + GPU_RESERVE_BYTES

"""`ModelConfig`: the shape of a model, read from a checkpoint's `config.json`. Standard library only."""

from dataclasses import dataclass
from typing import Any

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a dense Qwen model. Field names are Hugging Face's."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    rope_scaling: dict[str, Any] | None = None  # see models/rope.py for the accepted kinds
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # q, k and v projections have a bias (Qwen2)
    qk_norm: bool = True  # RMSNorm over each head of q and k (Qwen3)
    dtype: str = "bfloat16"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __hash__(self) -> int:  # rope_scaling is a dict
        return hash(repr(self))

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_params(self) -> int:
        """Number of parameters, embeddings counted once when tied."""
        d, h = self.hidden_size, self.head_dim
        n, k = self.num_attention_heads, self.num_key_value_heads
        layer = d * (n + 2 * k) * h + n * h * d + 3 * d * self.intermediate_size + 2 * d
        layer += (n + 2 * k) * h * self.attention_bias + 2 * h * self.qk_norm
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + d

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of K and V of one token over all layers, on all devices together."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Reads a Hugging Face `config.json`.

        Raises:
          ValueError: an architecture, a switch or a value that qjax does not serve; the message names it.
        """
        names = config.get("architectures") or []
        architecture = next((name for name in names if name in ARCHITECTURES), None)
        if architecture is None:
            raise ValueError(
                f"config.json: architectures={names!r} is not supported. Supported: {', '.join(ARCHITECTURES)}."
            )
        if config.get("use_sliding_window"):
            raise ValueError(
                "config.json: use_sliding_window=true is not supported; qjax attends to the whole context."
            )
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method")
            raise ValueError(f"config.json: quantization_config (quant_method={method!r}) is not supported yet.")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act={config['hidden_act']!r} is not supported, expected 'silu'.")

        def need(name: str) -> Any:
            if config.get(name) is None:
                raise ValueError(f"config.json: {name} is missing.")
            return config[name]

        is_qwen3 = architecture == "Qwen3ForCausalLM"
        heads = need("num_attention_heads")
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}."
            )
        # transformers 5 writes rope_parameters (with rope_theta inside), older files rope_theta and rope_scaling.
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope_theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
        kind = rope.get("rope_type", rope.get("type", "default"))
        eos = config.get("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=need("vocab_size"),
            hidden_size=need("hidden_size"),
            intermediate_size=need("intermediate_size"),
            num_hidden_layers=need("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=config.get("head_dim") or need("hidden_size") // heads,
            max_position_embeddings=need("max_position_embeddings"),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope_theta),
            rope_scaling=None if kind == "default" else rope,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)) if is_qwen3 else True,
            qk_norm=is_qwen3,
            dtype=config.get("dtype") or config.get("torch_dtype") or "bfloat16",
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
            bos_token_id=config.get("bos_token_id"),
        )

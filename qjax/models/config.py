"""`ModelConfig`: the shape of a model, read from a checkpoint's `config.json`. Standard library only."""

from dataclasses import dataclass, replace
from typing import Any

from qjax.quantization.config import Method, Quantization

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen2ForCausalLM")
# What `from_hf` reads of a config.json.
HF_FIELDS = {
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "hidden_act",
    "use_sliding_window",
    "num_experts",
    "num_local_experts",  # the same, as transformers 5 writes it
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "router_aux_loss_coef",
    "quantization_config",
    "dtype",
    "torch_dtype",
    "eos_token_id",
    "bos_token_id",
    "classifier_from_token",  # this and the next are read by checkpoint/pooling
    "is_original_qwen3_reranker",
}
# Kinds of rotary embedding in models/rope.py: needed keys, then those that may be there.
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a Qwen model. Field names are Hugging Face's."""

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
    rope_scaling: dict[str, Any] | None = None  # with rope_type and the keys of ROPE_KEYS; None: default
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # q, k and v projections have a bias (Qwen2)
    qk_norm: bool = True  # RMSNorm over each head of q and k (Qwen3)
    dtype: str = "bfloat16"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    quantization: Quantization | None = None  # None: weights are as they are computed with
    kv_scales: bool = False  # the KV cache is FP8 and the checkpoint has scales for it
    num_experts: int = 0  # E of a sparse layer; 0: every layer is dense
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # of one expert; intermediate_size is that of dense layers
    norm_topk_prob: bool = False  # the weights of a token's experts are scaled to sum to 1
    decoder_sparse_step: int = 1  # every so many layers one is sparse, but for those of mlp_only_layers
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.0  # of the load-balancing loss in training
    expert_parallel: bool = False  # devices split the experts, not the intermediate size of each

    def __hash__(self) -> int:  # rope_scaling is a dict
        return hash(repr(self))

    @property
    def attention_output_bias(self) -> bool:
        """o_proj has a bias: where attention_bias is set, in Qwen3 but not in Qwen2."""
        return self.attention_bias and self.architecture != "Qwen2ForCausalLM"

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's feed-forward is a mixture of experts."""
        is_in_step = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return is_in_step and layer not in self.mlp_only_layers

    @property
    def num_sparse_layers(self) -> int:
        return sum(self.is_sparse(layer) for layer in range(self.num_hidden_layers))

    def sizes_to_split(self, tp: int) -> dict[str, int]:
        """Sizes by name that tensor parallelism splits.

        Raises:
          ValueError: on `tp` devices groups of quantised weights would be cut; the message names the size.
        """
        dense, sparse = {"intermediate_size": self.intermediate_size}, {}
        if self.num_sparse_layers == self.num_hidden_layers:
            dense = {}
        if self.num_sparse_layers:
            sparse = {"moe_intermediate_size": self.moe_intermediate_size}
        if self.quantization is not None:
            names = ("head_dim", "num_attention_heads", "num_key_value_heads", "hidden_size")
            self.quantization.check_sizes(tp, **{name: getattr(self, name) for name in names}, **dense)
            for name, size in sparse.items():
                self.quantization.check_split(name, size, 1 if self.expert_parallel else tp)
        if sparse and self.expert_parallel:
            sparse = {"num_experts": self.num_experts}
        return {"vocab_size": self.vocab_size} | dense | sparse

    @property
    def max_context_len(self) -> int:
        """Positions the model serves: its own, or more where rope_scaling stretches them (vLLM's max_model_len)."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        original = self.rope_scaling.get("original_max_position_embeddings") or self.max_position_embeddings
        return max(self.max_position_embeddings, int(original * self.rope_scaling["factor"]))

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_params(self) -> int:
        """Number of parameters, embeddings counted once when tied."""
        d, h = self.hidden_size, self.head_dim
        n, k = self.num_attention_heads, self.num_key_value_heads
        layer = d * (n + 2 * k) * h + n * h * d + 2 * d
        layer += (n + 2 * k) * h * self.attention_bias + d * self.attention_output_bias + 2 * h * self.qk_norm
        dense = (self.num_hidden_layers - self.num_sparse_layers) * 3 * d * self.intermediate_size
        sparse = self.num_sparse_layers * (self.num_experts * 3 * d * self.moe_intermediate_size + d * self.num_experts)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + dense + sparse + embeddings + d

    @property
    def num_active_params(self) -> int:
        """Those that one token is multiplied with or looked up in: all but the experts it is not sent to."""
        idle = self.num_experts - self.num_experts_per_tok
        return self.num_params - self.num_sparse_layers * idle * 3 * self.hidden_size * self.moe_intermediate_size

    def weights_bytes(self, itemsize: int) -> int:
        """Bytes of all parameters, those that are not quantised with `itemsize`, embeddings counted once when tied."""
        total = self.num_params * itemsize
        if self.quantization is None:
            return total
        d, f, heads = self.hidden_size, self.intermediate_size, self.num_attention_heads * self.head_dim
        kv = 2 * self.num_key_value_heads * self.head_dim
        sizes = {"self_attn.qkv_proj": d * (heads + kv), "self_attn.o_proj": d * heads}
        dense = {"mlp.gate_up_proj": 2 * d * f, "mlp.down_proj": d * f}
        all_experts = self.num_experts * d * self.moe_intermediate_size
        sparse = {"mlp.experts.gate_up_proj": 2 * all_experts, "mlp.experts.down_proj": all_experts}
        for layer in range(self.num_hidden_layers):
            for name, size in (sizes | (sparse if self.is_sparse(layer) else dense)).items():
                if self.quantization.covers(f"model.layers.{layer}.{name}"):
                    total += self.quantization.num_bytes(size) - size * itemsize
        return total

    def with_expert_parallel(self, tp: int) -> "ModelConfig":
        """The config of what the option `enable_expert_parallel` asks for.

        Raises:
          ValueError: there are no experts, or `tp` devices cannot share them.
        """
        if not self.num_sparse_layers:
            raise ValueError(f"enable_expert_parallel: the model ({self.architecture}) has no experts.")
        if self.num_experts % tp:
            valid = ", ".join(str(size) for size in range(1, self.num_experts + 1) if self.num_experts % size == 0)
            raise ValueError(
                f"enable_expert_parallel: tensor_parallel_size={tp} does not divide num_experts={self.num_experts}. "
                f"Sizes that work: {valid}."
            )
        return replace(self, expert_parallel=True)

    def with_quantization(self, method: Method | None) -> "ModelConfig":
        """The config of what the option `quantization` asks for; None: the checkpoint as it is.

        Raises:
          ValueError: that is neither the checkpoint's own nor made while loading.
        """
        own = None if self.quantization is None else self.quantization.method
        if own is None and method in ("fp8", "int4"):
            return replace(self, quantization=Quantization(method, is_made=True))
        if method not in (None, own):
            found = "is not quantised" if own is None else f"is quantised by {own!r}"
            raise ValueError(
                f"quantization={method!r}, but the checkpoint {found}. Leave --quantization out to take the "
                "checkpoint's; only fp8 and int4 are made while loading, of a checkpoint that is not quantised."
            )
        return self

    def check_not_quantized(self, what: str) -> None:
        """Raises ValueError, which begins with `what`, for a quantised checkpoint."""
        if self.quantization is not None:
            raise ValueError(
                f"{what}: the model is quantised ({self.quantization.method}), which is for inference only. Use its "
                "checkpoint in bfloat16."
            )

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
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act={config['hidden_act']!r} is not supported, expected 'silu'.")

        def need(name: str) -> Any:
            if config.get(name) is None:
                raise ValueError(f"config.json: {name} is missing.")
            return config[name]

        is_qwen3 = architecture != "Qwen2ForCausalLM"
        heads = need("num_attention_heads")
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}."
            )
        quantization = config.get("quantization_config")
        experts = _experts_of(config) if architecture == "Qwen3MoeForCausalLM" else {}
        rope = _rope_of(config)
        rope_theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
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
            rope_scaling=_check_rope(rope),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)) if is_qwen3 else True,
            qk_norm=is_qwen3,
            dtype=config.get("dtype") or config.get("torch_dtype") or "bfloat16",
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
            bos_token_id=config.get("bos_token_id"),
            quantization=Quantization.from_hf(quantization) if quantization else None,
            **experts,
        )


def _experts_of(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a mixture of experts, checked. transformers 5 calls num_experts num_local_experts too."""
    fields: dict[str, Any] = {"num_experts": config.get("num_experts") or config.get("num_local_experts")}
    fields |= {name: config.get(name) for name in ("num_experts_per_tok", "moe_intermediate_size")}
    fields["decoder_sparse_step"] = config.get("decoder_sparse_step") or 1
    for name, value in fields.items():
        if value is None:
            raise ValueError(f"config.json: {name} is missing.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json: {name} must be a whole number above 0, got {value!r}.")
    if fields["num_experts_per_tok"] > fields["num_experts"]:
        raise ValueError(
            f"config.json: num_experts_per_tok={fields['num_experts_per_tok']} is more than "
            f"num_experts={fields['num_experts']}."
        )
    fields["mlp_only_layers"] = tuple(config.get("mlp_only_layers") or ())
    fields["norm_topk_prob"] = bool(config.get("norm_topk_prob", False))
    fields["router_aux_loss_coef"] = float(config.get("router_aux_loss_coef", 0.001))
    return fields


def apply_overrides(
    hf_config: dict[str, Any], hf_overrides: dict[str, Any], rope_scaling: dict[str, Any] | None
) -> dict[str, Any]:
    """A `config.json` as the options `hf_overrides` and `rope_scaling` change it.

    Objects inside are merged; a rope object of another kind, and `rope_scaling` as a whole, replace the file's (but
    keep its rope_theta). `rope_scaling` and `rope_parameters`, the older and the newer name, mean the same.

    Raises:
      ValueError: `hf_overrides` names a field that neither the file nor qjax knows.
    """
    for name in hf_overrides:
        if name not in HF_FIELDS and name not in hf_config:
            raise ValueError(f"hf_overrides: config.json has no field {name!r}.")
    rope_names = ("rope_scaling", "rope_parameters")
    merged = _merge(hf_config, {k: v for k, v in hf_overrides.items() if k not in rope_names})
    rope = _rope_of(hf_config)
    if "rope_theta" in hf_overrides:
        rope.pop("rope_theta", None)
    for name in rope_names:
        if name in hf_overrides:
            rope = _override_rope(rope, hf_overrides[name], f"hf_overrides: {name}")
    if rope_scaling is not None:
        theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        rope = theta | _named_kind(rope_scaling)
    merged.pop("rope_scaling", None)
    return merged | {"rope_parameters": rope or None}


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _override_rope(rope: dict[str, Any], changes: Any, where: str) -> dict[str, Any]:
    if changes is not None and not isinstance(changes, dict):
        raise ValueError(f"{where} must be an object or null, got {changes!r}.")
    changes = _named_kind(changes or {"rope_type": "default"})
    kind = rope.get("rope_type", "default")
    if changes.get("rope_type", kind) != kind:
        rope = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return rope | changes


def _named_kind(rope: dict[str, Any]) -> dict[str, Any]:
    """A rope object whose kind stands under `rope_type`, not under the older `type`."""
    rope = dict(rope)
    kind = rope.pop("type", None)
    return rope if kind is None else {"rope_type": kind} | rope


def _rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters (with rope_theta inside), older files rope_theta and rope_scaling."""
    return _named_kind(config.get("rope_parameters") or config.get("rope_scaling") or {})


def _check_rope(rope: dict[str, Any]) -> dict[str, Any] | None:
    """The rope object if it asks for more than the default, checked."""
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise ValueError(f"rope_scaling: rope_type={kind!r} is not supported. Supported: {', '.join(ROPE_KEYS)}.")
    needed, optional = ROPE_KEYS[kind]
    for key in sorted(needed - set(rope)):
        raise ValueError(f"rope_scaling: rope_type={kind!r} needs {key!r}.")
    for key in sorted(set(rope) - needed - optional - {"rope_type"}):
        raise ValueError(f"rope_scaling: unknown key {key!r} for rope_type={kind!r}.")
    for key in (needed | optional) & set(rope) - {"truncate"}:
        if isinstance(rope[key], bool) or not isinstance(rope[key], int | float) or rope[key] <= 0:
            raise ValueError(f"rope_scaling: {key} must be a number above 0, got {rope[key]!r}.")
    if rope.get("factor", 1) < 1:
        raise ValueError(f"rope_scaling: factor must be at least 1, got {rope['factor']!r}.")
    return None if kind == "default" else rope

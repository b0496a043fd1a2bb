"""Qwen3 (and Qwen2) as a Flax module, top to bottom: model, decoder layer, attention, dense feed-forward.

The model knows tokens, positions and its weights; how attention finds earlier keys and values is the batch's
matter (`attend`): the paged batch of the engine or a dense one. Fused weights lie so that tensor parallelism splits
them on one axis without moving a row (`K` KV heads, each with its `G` query heads, or `F`).
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding
from qjax.models.config import ModelConfig
from qjax.models.layers import Embedding, Linear, RMSNorm, matmul, parameter
from qjax.models.moe import MoEFeedForward
from qjax.models.projection import projection
from qjax.models.rope import rope_angles

type QKNorms = tuple[jax.Array, jax.Array]  # weights [H] of the queries' and the keys' RMSNorm
type Rope = tuple[jax.Array, jax.Array]  # cos and sin, float32 [T, H / 2]


class AttendingBatch(Protocol):
    """What the model asks of its input; `models/batch.py` has the engine's."""

    @property
    def token_ids(self) -> jax.Array: ...  # int32 [T]

    @property
    def positions(self) -> jax.Array: ...  # int32 [T]

    @property
    def is_token(self) -> jax.Array: ...  # bool [T]; False: padding, which no expert sees

    implementation: ClassVar[str | None]  # of kernels outside attention; "reference" has gradients

    def attend(
        self,
        parts: jax.Array,  # [N, T, K, G + 2, H]
        norms: QKNorms | None,
        eps: float,
        rope: Rope,
        cache: Any,
        layer: jax.Array | int,
        *,
        dtype: jnp.dtype,  # of the result
        kv_scales: jax.Array | None,  # float32 [2, K] of an FP8 cache
    ) -> tuple[jax.Array, Any]: ...  # [T, K, G, H], cache

    def after_routing(self, probs: jax.Array, experts: jax.Array, cache: Any) -> Any: ...  # [T, E], [T, k] → cache


class Qwen3ForCausalLM(nnx.Module):
    """A Qwen decoder, dense or with experts. Parameters have Hugging Face's names, fused ones vLLM's.

    Args:
      dtype: of the weights, and so of the residual stream.
      tensor_parallel_size: of the mesh it is built under (`jax.set_mesh`); it decides how KV heads are replicated.
      rngs: for random weights; None: zeros and ones (to be replaced, or never computed: `abstract_model`).
    Raises:
      ValueError: the devices cannot share the model; see `split_heads`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype,
        tensor_parallel_size: int = 1,
        rngs: nnx.Rngs | None = None,
    ):
        heads = split_heads(config, tensor_parallel_size)
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, i, heads, dtype=dtype, rngs=rngs) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, dtype=dtype)
        shape, axes = (config.hidden_size, config.vocab_size), ("embed", "vocab")
        self.lm_head = None if config.tie_word_embeddings else Linear(shape, axes, dtype=dtype, rngs=rngs)

    def __call__(self, batch: AttendingBatch, cache: Any) -> tuple[jax.Array, Any]:
        """Hidden states after the last norm [T, D], and the cache with the step's keys and values."""
        x, parts = self.embed_tokens(batch.token_ids), None  # [T, D]; what is yet to be added to the residual stream
        rope = rope_angles(batch.positions, self.config)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x, parts, cache = _run_layer(*nnx.split(layer), x, parts, rope, batch, cache, jnp.int32(index))
        return self.norm.after(x, parts, batch.implementation)[1], cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, D] → float32 [R, V], whole on every device."""
        if self.lm_head is None:
            logits = matmul(hidden, self.embed_tokens.weight[...], (1,), out_dtype=jnp.float32)
        else:
            logits = matmul(hidden, self.lm_head.kernel[...], out_dtype=jnp.float32)
        return jax.sharding.reshard(logits, sharding.spec_like(hidden, None))


def split_heads(config: ModelConfig, tp: int) -> tuple[int, int]:
    """(K, G) of `sharding.split_heads` on `tp` devices.

    Raises:
      ValueError: they cannot share the model; the message names the size that stands in the way, and how many can.
    """

    def split(tp: int) -> tuple[int, int]:
        sharding.check_split(tp, **config.sizes_to_split(tp))
        return sharding.split_heads(config.num_attention_heads, config.num_key_value_heads, tp)

    def can_split(tp: int) -> bool:
        try:
            return bool(split(tp))
        except ValueError:
            return False

    try:
        return split(tp)
    except ValueError as error:
        valid = [str(n) for n in range(1, config.num_attention_heads + 1) if can_split(n)]
        raise ValueError(f"{error} Sizes that work: {', '.join(valid) or 'none'}.") from None


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graphdef, state, *args):
    """Traced and lowered once for all layers, which is most of what a step's start-up costs in Python."""
    return nnx.merge(graphdef, state)(*args)


class DecoderLayer(nnx.Module):
    def __init__(
        self, config: ModelConfig, index: int, heads: tuple[int, int], *, dtype: jnp.dtype, rngs: nnx.Rngs | None
    ):
        name = f"model.layers.{index}"  # the checkpoint's: it says what is quantised
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, "embed", eps, dtype=dtype)
        self.self_attn = Attention(config, f"{name}.self_attn", heads, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(size, "embed", eps, dtype=dtype)
        self.mlp = (
            MoEFeedForward(config, f"{name}.mlp", dtype=dtype, rngs=rngs)
            if config.is_sparse(index)
            else FeedForward(config, f"{name}.mlp", dtype=dtype, rngs=rngs)
        )

    def __call__(
        self,
        x: jax.Array,
        parts: jax.Array | None,
        rope: Rope,
        batch: AttendingBatch,
        cache: Any,
        layer: jax.Array | int,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """The residual stream and what it has yet to take up: an addition and the norm behind it are one kernel."""
        x, normed = self.input_layernorm.after(x, parts, batch.implementation)
        attended, cache = self.self_attn(normed, rope, batch, cache, layer)
        x, normed = self.post_attention_layernorm.after(x, attended, batch.implementation)
        if isinstance(self.mlp, MoEFeedForward):
            return x, *self.mlp(normed, batch, cache)
        return x, self.mlp(normed, batch.implementation), cache


class Attention(nnx.Module):
    def __init__(
        self, config: ModelConfig, name: str, heads: tuple[int, int], *, dtype: jnp.dtype, rngs: nnx.Rngs | None
    ):
        D, H, (K, G) = config.hidden_size, config.head_dim, heads
        # For each KV head its G query heads, then k, then v.
        self.qkv_proj = projection(
            config,
            f"{name}.qkv_proj",
            (D, K, G + 2, H),
            ("embed", "kv_heads", "heads_of_kv", "head_dim"),
            use_bias=config.attention_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.o_proj = projection(
            config,
            f"{name}.o_proj",
            (K, G, H, D),
            ("kv_heads", "heads_of_kv", "head_dim", "embed"),
            num_inputs=3,
            use_bias=config.attention_output_bias,
            dtype=dtype,
            rngs=rngs,
        )
        axes = sharding.KV_SCALES_AXES
        self.kv_scales = parameter((2, K), axes, jnp.float32, rngs=None, init=1.0) if config.kv_scales else None
        self.q_norm = RMSNorm(H, "head_dim", config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(H, "head_dim", config.rms_norm_eps, dtype=dtype) if config.qk_norm else None

    def __call__(
        self, x: jax.Array, rope: Rope, batch: AttendingBatch, cache: Any, layer: jax.Array | int
    ) -> tuple[jax.Array, Any]:
        norms, eps = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            norms, eps = (self.q_norm.weight[...], self.k_norm.weight[...]), self.q_norm.eps
        qkv = self.qkv_proj.parts(x, batch.implementation)
        scales = None if self.kv_scales is None else self.kv_scales[...]
        out, cache = batch.attend(qkv, norms, eps, rope, cache, layer, dtype=x.dtype, kv_scales=scales)  # [T, K, G, H]
        return self.o_proj.parts(out, batch.implementation), cache


class FeedForward(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, name: str, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        D, F = config.hidden_size, config.intermediate_size
        gate_up_axes, down_axes = ("embed", "gate_up", "mlp"), ("mlp", "embed")
        self.gate_up_proj = projection(config, f"{name}.gate_up_proj", (D, 2, F), gate_up_axes, dtype=dtype, rngs=rngs)
        self.down_proj = projection(config, f"{name}.down_proj", (F, D), down_axes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, implementation: str | None) -> jax.Array:
        """[P, T, D]: see `Linear.parts`."""
        hidden = self.gate_up_proj.parts(x, implementation, is_gated=True)[0]  # [T, F]
        return self.down_proj.parts(hidden, implementation)


@dataclass(frozen=True)
class ModelDef:
    """A model without its arrays; hashable, so a jitted function may close over it."""

    graphdef: Any
    treedef: Any
    paths: tuple[str, ...]  # of each leaf, such as "layers.0.self_attn.qkv_proj.kernel"


def split(model: Qwen3ForCausalLM) -> tuple[ModelDef, tuple[jax.Array, ...]]:
    """A model as flat leaves: a jitted step takes those, as passing a module costs milliseconds of host time."""
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten_with_path(state)
    paths = tuple(".".join(str(key.key) for key in path if hasattr(key, "key")) for path, _ in leaves)
    return ModelDef(graphdef, treedef, paths), tuple(leaf for _, leaf in leaves)


def merge(modeldef: ModelDef, leaves: tuple[jax.Array, ...]) -> Qwen3ForCausalLM:
    """The inverse of `split`; at trace time."""
    return nnx.merge(modeldef.graphdef, jax.tree.unflatten(modeldef.treedef, leaves))


def abstract_model(
    config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh
) -> tuple[ModelDef, tuple[jax.ShapeDtypeStruct, ...]]:
    """What `split` gives, with shapes, dtypes and shardings in place of arrays: no memory, no compilation.

    Raises:
      ValueError: the mesh's tensor_parallel_size does not divide a size of the model.
    """
    tp = sharding.tensor_parallel_size(mesh)
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: Qwen3ForCausalLM(config, dtype=jnp.dtype(dtype), tensor_parallel_size=tp))
    modeldef, leaves = split(model)
    return modeldef, tuple(sharding.on_devices(mesh, leaf) for leaf in leaves)

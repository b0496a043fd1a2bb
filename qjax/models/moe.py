"""The feed-forward of a mixture of experts: a router sends each token to a few of E SwiGLUs, whose outputs are added.

Every expert's F is split over devices as a dense layer's is, so that each device has a part of all experts; or, with
`expert_parallel`, each device has some experts whole.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding
from qjax.kernels.grouped_matmul import route, tile_rows
from qjax.models.config import ModelConfig
from qjax.models.layers import Linear, matmul
from qjax.models.projection import experts_projection


class RoutedBatch(Protocol):
    """What the experts ask of the model's input; see `qwen3.AttendingBatch`."""

    @property
    def implementation(self) -> str | None: ...

    @property
    def is_token(self) -> jax.Array: ...

    def after_routing(self, probs: jax.Array, experts: jax.Array, cache: Any) -> Any: ...


class MoEFeedForward(nnx.Module):
    """Parameters have Hugging Face's names: `gate` is the router, `experts` has the weights of all experts."""

    def __init__(self, config: ModelConfig, name: str, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        shape = (config.hidden_size, config.num_experts)
        self.gate = Linear(shape, ("embed", "experts"), dtype=dtype, rngs=rngs)
        self.experts = Experts(config, f"{name}.experts", dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, batch: RoutedBatch, cache: Any) -> tuple[jax.Array, Any]:
        """x [T, D] → ([1, T, D], see `Linear.parts`; the cache as `batch.after_routing` gives it)."""
        where = sharding.spec_like(x, "experts")
        logits = matmul(x, self.gate.kernel[...], out_dtype=jnp.float32, out_sharding=where)
        probs = jax.nn.softmax(logits)
        # Nobody computes these two where the batch does not look at them.
        cache = batch.after_routing(probs, jax.lax.top_k(probs, self.experts.num_experts_per_tok)[1], cache)
        return self.experts(x, logits, batch.is_token, batch.implementation), cache


class Experts(nnx.Module):
    def __init__(self, config: ModelConfig, name: str, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.num_experts_per_tok = E, config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.split = ("split_experts", "whole_mlp") if config.expert_parallel else ("experts", "mlp")
        experts, mlp = self.split
        make = functools.partial(experts_projection, config, dtype=dtype, rngs=rngs)
        self.gate_up_proj = make(f"{name}.gate_up_proj", (E, D, 2, F), (experts, "embed", "gate_up", mlp))
        self.down_proj = make(f"{name}.down_proj", (E, F, D), (experts, mlp, "embed"))

    def __call__(self, x: jax.Array, logits: jax.Array, is_token: jax.Array, implementation: str | None) -> jax.Array:
        """x [T, D], the router's logits float32 [T, E], bool [T] → [1, T, D]; what is no token is sent nowhere."""
        weights = (*self.gate_up_proj.weights, *self.down_proj.weights)
        num_gate_up = len(self.gate_up_proj.weights)

        def on_device(x, logits, is_token, *arrays):
            gate_up, down = arrays[:num_gate_up], arrays[num_gate_up:]
            tile, own = tile_rows(x.shape[0] * self.num_experts_per_tok, self.num_experts), arrays[0].shape[0]
            is_split = own < self.num_experts
            routing = route(
                logits,
                is_token,
                k=self.num_experts_per_tok,
                tile=tile,
                is_normalized=self.norm_topk_prob,
                own_experts=(own * sharding.shard_index(self.split[0]), own) if is_split else None,
            )
            rows = routing.rows_of(x)
            run = functools.partial(self.gate_up_proj.product, is_gated=True, implementation=implementation)
            hidden = run(rows, *gate_up, routing.work)
            out = self.down_proj.product(hidden, *down, routing.work, implementation=implementation)
            return (sharding.sum_over(routing.join(out).astype(x.dtype), self.split)[None],)

        tokens = sharding.token_axis(x)
        rows = (tokens, "embed")
        in_axes = (rows, (tokens, "experts"), (tokens,), *(axes for _, axes in weights))
        on_devices = sharding.per_shard(on_device, in_axes=in_axes, out_axes=(("parts", *rows),))
        return on_devices(x, logits, is_token, *(weight[...] for weight, _ in weights))[0]

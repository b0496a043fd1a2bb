"""The feed-forward of a mixture of experts: a router sends each token to a few of E SwiGLUs, whose outputs are added.

Every expert's F is split over devices as a dense layer's is, so that each device has a part of all experts; or, with
`expert_parallel`, each device has some experts whole.
"""

import functools
import operator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding
from qjax.kernels.grouped_matmul import group_rows, tile_rows
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
        self.num_experts_per_tok = config.num_experts_per_tok

    def __call__(self, x: jax.Array, batch: RoutedBatch, cache: Any) -> tuple[jax.Array, Any]:
        """x [T, D] → ([1, T, D], see `Linear.parts`; the cache as `batch.after_routing` gives it)."""
        where = sharding.spec_like(x, "experts")
        logits = matmul(x, self.gate.kernel[...], out_dtype=jnp.float32, out_sharding=where)
        probs = jax.nn.softmax(logits)
        experts = choose_experts(probs, self.num_experts_per_tok)
        cache = batch.after_routing(probs, experts, cache)
        experts = jnp.where(batch.is_token[:, None], experts, probs.shape[1])  # padding would fetch weights
        return self.experts(x, probs, experts, batch.implementation), cache


def choose_experts(probs: jax.Array, k: int) -> jax.Array:
    """The k most probable experts of each token, most probable first, of equal ones the first.

    probs float32 [T, E] → int32 [T, k]
    """
    # An expert's rank is the number of better ones: comparisons and sums fuse, where top_k would sort.
    ids = jnp.arange(probs.shape[1])
    mine, other = probs[:, :, None], probs[:, None, :]
    is_better = (other > mine) | ((other == mine) & (ids[None, :] < ids[:, None]))
    rank = jnp.sum(is_better, axis=2, dtype=jnp.int32)  # [T, E]
    is_chosen = rank[:, None, :] == jnp.arange(k)[:, None]  # [T, k, E]
    return jnp.sum(jnp.where(is_chosen, ids, 0), axis=2, dtype=jnp.int32)


def weights_of(probs: jax.Array, experts: jax.Array, *, is_normalized: bool) -> jax.Array:
    """float32 [T, k]: the probabilities of `choose_experts`' experts, `is_normalized` divided by their sum."""
    weights = jnp.take_along_axis(probs, experts, axis=1, mode="clip")
    if not is_normalized:
        return weights
    # Not jnp.sum: a few additions are computed where the weights are needed, a sum is a kernel of its own.
    total = functools.reduce(operator.add, [weights[:, j] for j in range(experts.shape[1])])
    return weights / total[:, None]


class Experts(nnx.Module):
    def __init__(self, config: ModelConfig, name: str, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.norm_topk_prob = E, config.norm_topk_prob
        self.split = ("split_experts", "whole_mlp") if config.expert_parallel else ("experts", "mlp")
        experts, mlp = self.split
        make = functools.partial(experts_projection, config, dtype=dtype, rngs=rngs)
        self.gate_up_proj = make(f"{name}.gate_up_proj", (E, D, 2, F), (experts, "embed", "gate_up", mlp))
        self.down_proj = make(f"{name}.down_proj", (E, F, D), (experts, mlp, "embed"))

    def __call__(self, x: jax.Array, probs: jax.Array, experts: jax.Array, implementation: str | None) -> jax.Array:
        """x [T, D], probs float32 [T, E], experts int32 [T, k] → [1, T, D]; an expert E is none."""
        tile = tile_rows(experts.size, self.num_experts)
        weights = (*self.gate_up_proj.weights, *self.down_proj.weights)
        num_gate_up = len(self.gate_up_proj.weights)

        def on_device(x, probs, experts, *arrays):
            gate_up, down = arrays[:num_gate_up], arrays[num_gate_up:]
            own = arrays[0].shape[0]
            groups = group_rows(experts - own * sharding.shard_index(self.split[0]), own, tile)  # drops all others
            rows = x.at[groups.source].get(mode="fill", fill_value=0)
            run = functools.partial(self.gate_up_proj.product, is_gated=True, implementation=implementation)
            hidden = run(rows, *gate_up, groups.work)
            out = self.down_proj.product(hidden, *down, groups.work, implementation=implementation)
            out = out.at[groups.position].get(mode="fill", fill_value=0)  # [T, k, D]
            weights = weights_of(probs, experts, is_normalized=self.norm_topk_prob)
            out = jnp.sum(out * weights[:, :, None], axis=1).astype(x.dtype)
            return (sharding.sum_over(out, self.split)[None],)

        tokens = sharding.token_axis(x)
        rows = (tokens, "embed")
        in_axes = (rows, (tokens, "experts"), (tokens, "experts_of_token"), *(axes for _, axes in weights))
        on_devices = sharding.per_shard(on_device, in_axes=in_axes, out_axes=(("parts", *rows),))
        return on_devices(x, probs, experts, *(weight[...] for weight, _ in weights))[0]

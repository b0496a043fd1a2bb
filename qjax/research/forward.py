"""The model on packed rows, differentiable: hidden states and each token's loss. One place for training and scoring.

Weights are float32 masters; a copy in the compute dtype is made inside, so gradients arrive in float32. The embedding
is looked up in float32: its gradient is a sum over thousands of rows, which bfloat16 would lose.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qjax import sharding
from qjax.kernels.elementwise import add_parts
from qjax.models.qwen3 import ModelDef, merge
from qjax.models.rope import rope_angles
from qjax.research import loss
from qjax.research.batch import PackedBatch, RouterSums


@dataclass(frozen=True)
class ForwardOptions:
    """How a forward pass computes; static."""

    dtype: Any = jnp.bfloat16  # of activations and of the weights' copy
    remat: bool = False  # keep only each layer's input, compute the rest again in the backward pass
    num_loss_chunks: int = 1  # parts of each row whose logits [B, L / chunks, V] exist at a time


def hidden_states(
    modeldef: ModelDef, leaves: tuple[jax.Array, ...], batch: PackedBatch, options: ForwardOptions
) -> jax.Array:
    """States after the last norm, [T, D] in the compute dtype."""
    return states_and_routing(modeldef, leaves, batch, options)[0]


def states_and_routing(
    modeldef: ModelDef, leaves: tuple[jax.Array, ...], batch: PackedBatch, options: ForwardOptions
) -> tuple[jax.Array, RouterSums | None]:
    """States after the last norm, and what the routers of a mixture of experts did (None: the model has none)."""
    masters = merge(modeldef, leaves)
    model = merge(modeldef, tuple(leaf.astype(options.dtype) for leaf in leaves))
    where = sharding.spec_like(batch.token_ids, "embed")
    x = masters.embed_tokens.weight[...].at[batch.token_ids].get(out_sharding=where).astype(options.dtype)
    rope = rope_angles(batch.positions, model.config)
    sums = RouterSums.zeros(model.config.num_experts) if model.config.num_sparse_layers else None
    for index, layer in enumerate(model.layers):

        def run(x: jax.Array, sums: RouterSums | None, layer=layer, index: int = index):
            x, parts, sums = layer(x, None, rope, batch, sums, index)
            return add_parts(x, parts), sums

        with jax.named_scope(f"layer_{index}"):
            x, sums = jax.checkpoint(run)(x, sums) if options.remat else run(x, sums)
    return model.norm(x), sums


def token_logprobs(
    modeldef: ModelDef,
    leaves: tuple[jax.Array, ...],
    hidden: jax.Array,
    targets: jax.Array,
    row_length: int,
    options: ForwardOptions,
) -> jax.Array:
    """Log-probability of each target, float32 [T]; `hidden` [T, D], `targets` int32 [T] (of the next token).

    The logits exist for one chunk of every row at a time, also in the backward pass.
    """
    masters = merge(modeldef, leaves)
    lm_head = masters.lm_head
    return loss.token_logprobs(
        masters.embed_tokens.weight[...] if lm_head is None else lm_head.kernel[...],
        hidden,
        targets,
        is_tied=lm_head is None,
        row_length=row_length,
        num_chunks=options.num_loss_chunks,
    )

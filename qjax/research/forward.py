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
from qjax.research.batch import PackedBatch


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
    masters = merge(modeldef, leaves)
    model = merge(modeldef, tuple(leaf.astype(options.dtype) for leaf in leaves))
    where = sharding.spec_like(batch.token_ids, "embed")
    x = masters.embed_tokens.weight[...].at[batch.token_ids].get(out_sharding=where).astype(options.dtype)
    rope = rope_angles(batch.positions, model.config)
    for index, layer in enumerate(model.layers):

        def run(x: jax.Array, layer=layer, index: int = index) -> jax.Array:
            x, parts, _ = layer(x, None, rope, batch, None, index)
            return add_parts(x, parts)

        with jax.named_scope(f"layer_{index}"):
            x = jax.checkpoint(run)(x) if options.remat else run(x)
    return model.norm(x)


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

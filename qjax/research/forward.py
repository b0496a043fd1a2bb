"""The model on packed rows, differentiable: hidden states and each token's loss. One place for training and scoring.

Weights are float32 masters; a copy in the compute dtype is made inside, so gradients arrive in float32. The embedding
is looked up in float32: its gradient is a sum over thousands of rows, which bfloat16 would lose.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qjax import sharding
from qjax.models.layers import matmul
from qjax.models.qwen3 import ModelDef, merge
from qjax.models.rope import rope_angles
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
            return layer(x, rope, batch, None, index)[0]

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
    tied = lm_head is None
    head = masters.embed_tokens.weight[...] if lm_head is None else lm_head.kernel[...]  # [V, D] or [D, V]
    L, C, D = row_length, options.num_loss_chunks, hidden.shape[1]
    if L % C:
        raise ValueError(f"num_loss_chunks={C} does not divide the row length {L}.")
    B = hidden.shape[0] // L
    rows = sharding.spec("rows", None, None, None)
    chunks = jnp.swapaxes(hidden.reshape(B, C, L // C, D, out_sharding=rows), 0, 1)  # [C, B, L / C, D]
    wanted = jnp.swapaxes(targets.reshape(B, C, L // C, out_sharding=sharding.spec("rows", None, None)), 0, 1)

    @jax.checkpoint
    def one_chunk(head: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        # The cast is inside, so that the chunks' gradients of `head` are summed in float32.
        logits = matmul(hidden, head.astype(options.dtype), (1,) if tied else (0,), out_dtype=jnp.float32)  # [B, c, V]
        where = jax.typeof(logits).sharding
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2, out_sharding=where)
        chosen = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    if C == 1:
        out = one_chunk(head, chunks[0], wanted[0])[None]
    else:
        _, out = jax.lax.scan(lambda carry, chunk: (carry, one_chunk(head, *chunk)), None, (chunks, wanted))
    return jnp.swapaxes(out, 0, 1).reshape(B * L, out_sharding=sharding.spec("rows"))

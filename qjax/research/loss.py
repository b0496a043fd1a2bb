"""Log-probabilities of next tokens from hidden states, differentiable, without ever holding all logits.

Logits are a chunk's matter: the backward pass makes them again from the hidden states (Wijmans et al. 2024, "Cut Your
Losses", arXiv:2411.09009, has the idea) and turns them into a gradient in the compute dtype at once.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax import sharding


def token_logprobs(
    head: jax.Array, hidden: jax.Array, targets: jax.Array, *, is_tied: bool, row_length: int, num_chunks: int
) -> jax.Array:
    """Log-probability of each target, float32 [T].

    Args:
      head: [V, D] (the embedding, `is_tied`) or [D, V], split on V over tensor parallelism; float32
        where it is trained.
      hidden: [T, D] in the compute dtype, rows split over data.
      targets: int32 [T].
      num_chunks: parts of each row whose logits [B, row_length / num_chunks, V] exist at a time.
    """
    T, D = hidden.shape
    B, c = T // row_length, row_length // num_chunks
    rows = sharding.spec("rows", None, None, None)
    chunks = jnp.swapaxes(hidden.reshape(B, num_chunks, c, D, out_sharding=rows), 0, 1)  # [C, B, c, D]
    wanted = jnp.swapaxes(targets.reshape(B, num_chunks, c, out_sharding=sharding.spec("rows", None, None)), 0, 1)
    if num_chunks == 1:
        out = _chunk_logprobs(is_tied, head, chunks[0], wanted[0])[None]
    else:
        run = lambda carry, chunk: (carry, _chunk_logprobs(is_tied, head, *chunk))
        _, out = jax.lax.scan(run, None, (chunks, wanted))
    return jnp.swapaxes(out, 0, 1).reshape(T, out_sharding=sharding.spec("rows"))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_logprobs(is_tied: bool, head: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """hidden [B, c, D], targets [B, c] → float32 [B, c]."""
    return _forward(is_tied, head, hidden, targets)[0]


def _forward(is_tied: bool, head: jax.Array, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, Any]:
    logits = _logits(is_tied, head, hidden)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.sum(logits * _is_target(logits, targets), axis=-1)
    return chosen - total, (head, hidden, targets, total)


def _backward(is_tied: bool, saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    head, hidden, targets, total = saved
    logits = _logits(is_tied, head, hidden)
    grad_logits = (grad[..., None] * (_is_target(logits, targets) - jnp.exp(logits - total[..., None]))).astype(
        hidden.dtype
    )
    grad_hidden = jax.lax.dot_general(
        grad_logits,
        head.astype(hidden.dtype),
        (((2,), (0 if is_tied else 1,)), ((), ())),
        precision=_precision(hidden),
        preferred_element_type=hidden.dtype,
        out_sharding=jax.typeof(hidden).sharding,
    )
    left, right = (grad_logits, hidden) if is_tied else (hidden, grad_logits)
    grad_head = jax.lax.dot_general(
        left,
        right,
        (((0, 1), (0, 1)), ((), ())),
        precision=_precision(hidden),
        preferred_element_type=head.dtype,
        out_sharding=jax.typeof(head).sharding,
    )
    return grad_head, grad_hidden, None


_chunk_logprobs.defvjp(_forward, _backward)


def _logits(is_tied: bool, head: jax.Array, hidden: jax.Array) -> jax.Array:
    """float32 [B, c, V], split on V as `head` is."""
    return jax.lax.dot_general(
        hidden,
        head.astype(hidden.dtype),
        (((2,), (1 if is_tied else 0,)), ((), ())),
        precision=_precision(hidden),
        preferred_element_type=jnp.float32,
    )


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 [B, c, V], 1 at each target. No lookup: each device compares with the vocabulary that it holds."""
    V, axes = logits.shape[-1], jax.typeof(logits).sharding.spec
    # One row of ids, and no constant of the logits' size: a loop over chunks would keep it in memory.
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, V), 2, out_sharding=jax.P(None, None, axes[-1]))
    return (ids == targets[..., None]).astype(jnp.float32)


def _precision(x: jax.Array) -> Any:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

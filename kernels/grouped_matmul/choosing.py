"""Which experts a token is sent to, and with what weight, in plain jnp."""

import functools
import operator

import jax
import jax.numpy as jnp


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

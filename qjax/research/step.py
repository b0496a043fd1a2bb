"""The jitted training step over flat leaves: gradients of the packed rows' loss, then the optimizer. Pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qjax.models.qwen3 import ModelDef
from qjax.research.batch import PackedBatch
from qjax.research.forward import ForwardOptions, states_and_routing, token_logprobs

Leaves = tuple[jax.Array, ...]
Assemble = Callable[[Leaves, Leaves], Leaves]  # (trained, frozen) → the model's leaves


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes; donated to it."""

    params: Leaves  # float32 masters of what is trained
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainBatch:
    """Rows of one step in `A` parts (accumulation_steps), each of T = B * L places."""

    token_ids: jax.Array  # int32 [A, T]
    positions: jax.Array  # int32 [A, T]
    segment_ids: jax.Array  # int32 [A, T]
    targets: jax.Array  # int32 [A, T]
    weights: jax.Array  # float32 [A, T]


@dataclass(frozen=True)
class StepMetrics:
    """Of one step, read from what `train_step` returns."""

    loss: float  # mean over the targets with weight; of a mixture of experts with its load-balancing loss
    grad_norm: float  # before clipping; where it is no number the step has changed nothing
    num_targets: int
    num_tokens: int  # places that hold a token

    @classmethod
    def read(cls, packed: jax.Array) -> "StepMetrics":
        loss, grad_norm, num_targets, num_tokens = np.asarray(packed).tolist()
        return cls(loss, grad_norm, round(num_targets), round(num_tokens))


def take_trained(params: Leaves, frozen: Leaves) -> Leaves:
    """`StepDef.assemble` where the whole model is trained."""
    return params


@dataclass(frozen=True)
class StepDef:
    """The static part of a step."""

    modeldef: ModelDef
    row_length: int
    implementation: str  # of the attention
    forward: ForwardOptions
    optimizer: optax.GradientTransformation
    assemble: Assemble
    router_aux_loss_coef: float = 0.0  # of the load-balancing loss of a mixture of experts


def train_step(
    static: StepDef, state: TrainState, frozen: Leaves, batch: TrainBatch, learning_rate: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One optimizer step. The loss is the mean over all targets of the step, whatever the number of parts.

    Returns:
      (state, float32 [4]: the fields of `StepMetrics`).
    """

    def total_loss(params: Leaves, part: TrainBatch) -> jax.Array:
        leaves = static.assemble(params, frozen)
        packed = PackedBatch(part.token_ids, part.positions, part.segment_ids, static.row_length, static.implementation)
        hidden, routing = states_and_routing(static.modeldef, leaves, packed, static.forward)
        logprobs = token_logprobs(static.modeldef, leaves, hidden, part.targets, static.row_length, static.forward)
        loss = -jnp.sum(logprobs * part.weights)
        if routing is not None:  # it weighs as much as the part does in the mean
            loss += static.router_aux_loss_coef * routing.loss * jnp.sum(part.weights)
        return loss

    gradient = jax.value_and_grad(total_loss)
    if batch.token_ids.shape[0] == 1:
        loss, grads = gradient(state.params, jax.tree.map(lambda x: x[0], batch))
    else:

        def add(total: tuple[jax.Array, Leaves], part: TrainBatch) -> tuple[tuple[jax.Array, Leaves], None]:
            return jax.tree.map(jnp.add, total, gradient(state.params, part)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), state.params))
        (loss, grads), _ = jax.lax.scan(add, zeros, batch)
    num_targets = jnp.sum(batch.weights)
    scale = 1.0 / jnp.maximum(num_targets, 1.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = static.optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    new = TrainState(params, opt_state)
    new = jax.tree.map(lambda now, then: jnp.where(jnp.isfinite(norm), now, then), new, state)
    num_tokens = jnp.sum((batch.segment_ids > 0).astype(jnp.float32))
    return new, jnp.stack([loss * scale, norm, num_targets, num_tokens])

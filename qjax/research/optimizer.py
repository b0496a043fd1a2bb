"""The optimizer: AdamW through optax without its learning rate, and the schedules that give it.

The learning rate is an argument of the step, since under a time limit it depends on the clock.
"""

import math

import optax

from qjax.research.config import TrainConfig


def make_optimizer(config: TrainConfig, paths: tuple[str, ...]) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) up to the learning rate: clip, moments, decay.

    Args:
      paths: of the trained leaves; norms and biases do not decay.
    """
    parts = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    parts.append(optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=tuple(decays(path) for path in paths)))
    return optax.chain(*parts)


def decays(path: str) -> bool:
    """Whether weight decay applies to a leaf: to matrices, not to norms and biases."""
    return not path.endswith((".bias", "norm.weight"))


def learning_rate(config: TrainConfig, step: int, share: float) -> float:
    """The rate of step `step` (from 0) when `share` of the run is over.

    cosine: Loshchilov and Hutter 2016, arXiv:1608.03983; wsd (warm-up, stable, decay): Hu et al. 2024,
    arXiv:2404.06395.
    """
    share = min(max(share, 0.0), 1.0)
    match config.schedule:
        case "constant":
            left = 1.0
        case "linear":
            left = 1.0 - share
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * share))
        case "wsd":
            left = min(1.0, (1.0 - share) / config.decay_share) if config.decay_share else 1.0
    lowest = 1.0 if config.schedule == "constant" else config.min_learning_rate_ratio
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warm * (lowest + (1.0 - lowest) * left)

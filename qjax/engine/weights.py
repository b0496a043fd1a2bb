"""New weights for a loaded model, put in place on the devices: no copy through the host, no compiling."""

from collections.abc import Sequence

import jax

from qjax.engine.runner import Runner

FLOATS = {"float32", "bfloat16", "float16"}


def check_weights(leaves: Sequence[jax.Array], new: Sequence[jax.Array], paths: Sequence[str]) -> None:
    """Raises ValueError if `new` are not arrays for `leaves`, which lie at `paths` of the model."""
    if len(new) != len(leaves):
        raise ValueError(f"params: expected {len(leaves)} arrays, one for each leaf of the model, got {len(new)}.")
    for path, old, array in zip(paths, leaves, new, strict=True):
        if array.shape != old.shape:
            raise ValueError(f"params: {path} has shape {list(array.shape)}, the model's has {list(old.shape)}.")
        # Numbers are converted, but quantised weights mean nothing without their scales.
        if array.dtype != old.dtype and not {array.dtype.name, old.dtype.name} <= FLOATS:
            raise ValueError(f"params: {path} has dtype {array.dtype}, the model's is {old.dtype} (quantised).")


def update(runner: Runner, params: Sequence[jax.Array]) -> None:
    """The runner's leaves become copies of `params`."""
    check_weights(runner.leaves, params, runner.modeldef.paths)
    leaves, runner.leaves = list(runner.leaves), ()
    try:
        replace_weights(leaves, params)
    finally:
        runner.leaves = tuple(leaves)


def replace_weights(leaves: list[jax.Array], new: Sequence[jax.Array]) -> None:
    """Puts `new` into `leaves`, one after the other, in the dtype and the sharding of what they replace.

    They are copies: whoever made `new` may change or donate it. At most one leaf is there twice (besides `new`).
    """
    for i, array in enumerate(new):
        old = leaves[i]
        leaves[i] = jax.device_put(array.astype(old.dtype), old.sharding, may_alias=False)

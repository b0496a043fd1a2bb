"""A run's state on disk, through Orbax: what a step changes and where the data stands. Exact: resumed runs repeat the
losses of runs that were never stopped."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2  # newest checkpoints on disk


@dataclass(frozen=True)
class Progress:
    """Where a run stands, besides its arrays."""

    step: int
    epoch: int  # of the next batch
    row: int
    seconds: float  # spent so far
    options: dict[str, Any]  # those that must not change


class Checkpoints:
    """The checkpoints in a folder. Saving copies the arrays to the host and writes them in the background."""

    def __init__(self, folder: str | Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True)
        self._folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def is_empty(self) -> bool:
        return self._manager.latest_step() is None

    def save(self, state: Any, progress: Progress) -> None:
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(jax.tree.leaves(state)), progress=ocp.args.JsonSave(vars(progress))
            ),
        )

    def restore(self, state: Any, options: dict[str, Any]) -> tuple[Any, Progress]:
        """The newest checkpoint, on the devices where `state` lies.

        Args:
          state: arrays of the same tree, replaced by the checkpoint's.
          options: of this run; those of the checkpoint must be equal.

        Raises:
          ValueError: there is no checkpoint, or it is of a run with other options; the message names the first.
        """
        step = self._manager.latest_step()
        if step is None:
            raise ValueError(f"resume: there is no checkpoint in {self._folder}.")
        found = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        progress = Progress(**found["progress"])
        for name, value in json.loads(json.dumps(options)).items():
            if progress.options.get(name) != value:
                raise ValueError(
                    f"resume: the checkpoint in {self._folder} was made with {name}={progress.options.get(name)!r}, "
                    f"this run has {value!r}."
                )
        leaves, tree = jax.tree.flatten(state)
        abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return jax.tree.unflatten(tree, arrays["state"]), progress

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

"""Sleep: the devices' memory is given back while nobody asks, without ending the process or its compiled steps.

Level 1 keeps the weights in the host's memory, level 2 reads them from the checkpoint again. The KV cache and all that
the device knows of requests is dropped in both, so an engine sleeps only when nothing runs.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from qjax.engine.kv_offload import OffloadingRunner
from qjax.engine.runner import Runner

TAGS = ("weights", "kv_cache")  # vLLM's names of what can be woken on its own


class Sleeper:
    """Takes a runner's arrays off the devices, and puts them back.

    Args:
      reload: the leaves of the model, loaded anew.
    """

    def __init__(self, runner: Runner, reload: Callable[[], tuple[jax.Array, ...]]):
        self._runner = runner
        self._reload = reload
        self._on_host: list[tuple[np.ndarray, jax.sharding.Sharding]] = []
        self.asleep: set[str] = set()  # of TAGS

    def sleep(self, level: int) -> None:
        """Raises ValueError for another level than 1 and 2, and if the engine sleeps already."""
        if level not in (1, 2):
            raise ValueError(f"level must be 1 (weights to the host's memory) or 2 (weights dropped), got {level}.")
        self.check_awake(*TAGS)
        runner = self._runner
        if isinstance(runner, OffloadingRunner):
            runner.copy_out()  # what the host keeps outlives sleep
        runner.drop_cache()
        leaves, runner.leaves = runner.leaves, ()
        for leaf in leaves:  # one after the other: never is more there twice than a leaf
            if level == 1:
                self._on_host.append((np.array(leaf), leaf.sharding))
            leaf.delete()
        self.asleep = set(TAGS)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Puts back what sleeps, or the part of it that is named. Nothing happens to what is awake.

        Raises:
          ValueError: an unknown tag; or the checkpoint, after level 2, is not what it was.
        """
        for tag in tags or ():
            if tag not in TAGS:
                raise ValueError(f"tags must be of {', '.join(TAGS)}, got {tag!r}.")
        wanted = self.asleep & set(tags or TAGS)
        if "weights" in wanted:
            # The host's copies stay until all is there: where the memory is short, wake-up can be tried again.
            leaves = tuple(jax.device_put(array, placement) for array, placement in self._on_host)
            self._runner.leaves = leaves or self._reload()
            jax.block_until_ready(self._runner.leaves)
            self._on_host.clear()
        if "kv_cache" in wanted:
            self._runner.make_cache()
        self.asleep -= wanted

    def check_awake(self, *tags: str) -> None:
        """Raises ValueError if one of these sleeps."""
        if asleep := self.asleep & set(tags):
            raise ValueError(f"The engine sleeps ({', '.join(sorted(asleep))}): wake_up comes first.")

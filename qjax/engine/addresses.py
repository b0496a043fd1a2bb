"""Where a step's small arrays lie on a GPU: at the same addresses in every step.

XLA runs a step as one CUDA graph, which knows the addresses of all arrays. Whatever has moved since the last step is
written into the graph again by the host, at about 7 µs a kernel: a step of 300 kernels would wait 2 ms for that. The
weights, the cache and the state (donated, so written in place) stay; this keeps the other two kinds in place as well.
"""

import jax
import numpy as np

HOLE_BYTES = tuple(256 << k for k in range(13))  # to 1 MiB: what a step takes from the host and gives back
HOLES_OF_A_SIZE = 4  # two steps are in flight, each with an input and an output


class StepInputs:
    """The arrays that the host fills for each step, one a size."""

    def __init__(self, placement: jax.sharding.Sharding):
        self._placement = placement
        self._arrays: dict[int, jax.Array] = {}
        overwrite = lambda old, new: old.at[:].set(new)
        here = (placement, placement)
        self._overwrite = jax.jit(
            overwrite, in_shardings=here, out_shardings=placement, donate_argnums=0, keep_unused=True
        )

    def put(self, packed: np.ndarray) -> jax.Array:
        """int32 [n] on the devices, where the one before of this size was: the steps dispatched so far have read it."""
        if len(packed) not in self._arrays:
            self._arrays[len(packed)] = jax.device_put(np.zeros_like(packed), self._placement)
        self._arrays[len(packed)] = self._overwrite(self._arrays[len(packed)], packed)
        return self._arrays[len(packed)]


def make_holes(placement: jax.sharding.Sharding) -> list[jax.Array]:
    """Leaves small gaps in the devices' memory, for as long as the returned arrays, which lie between them, live.

    The allocator gives the smallest gap that fits. Without small gaps it would cut small arrays from the beginning of
    the large one, and a step's temporary buffer, which is allocated there, would move.
    """
    array = lambda size: jax.device_put(np.zeros(size, np.int8), placement)
    holes, walls = [], [array(256)]
    for size in HOLE_BYTES:
        for _ in range(HOLES_OF_A_SIZE):
            holes.append(array(size))
            walls.append(array(256))
    jax.block_until_ready((holes, walls))
    return walls

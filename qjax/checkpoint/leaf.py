"""`Leaf`: how one of the model's arrays is cut out of a checkpoint's tensors, and what is done to leaves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Leaf:
    """One leaf and the tensors it is made of.

    `axis` is the only one that devices split; `read(tensors, start, stop)` gives the leaf's part [start, stop) of it
    (in the tensors' dtype), touching no other part of the tensors; `write(leaf)` gives the tensors of a whole leaf.
    """

    shapes: dict[str, tuple[int, ...]]  # of the tensors, by name
    axis: int
    read: Callable[[Tensors, int, int], np.ndarray]
    write: Callable[[np.ndarray], dict[str, np.ndarray]]
    dtypes: dict[str, str] = field(default_factory=dict)  # of tensors that `read` makes something else of, by name


def stacked(leaves: Sequence[Leaf], whole: int | None) -> Leaf:
    """Leaves of the same shape on a new first axis.

    Args:
      whole: devices split the new axis, and each leaf's own axis, of that size, is not; None: as it was in each leaf.
    """

    def read(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        own, part = (leaves, (start, stop)) if whole is None else (leaves[start:stop], (0, whole))
        parts = (leaf.read(tensors, *part) for leaf in own)
        first = next(parts)
        out = np.empty((len(own), *first.shape), first.dtype)
        out[0] = first
        for i, array in enumerate(parts, 1):
            out[i] = array
        return out

    def write(array: np.ndarray) -> dict[str, np.ndarray]:
        return {name: x for leaf, one in zip(leaves, array, strict=True) for name, x in leaf.write(one).items()}

    shapes = {name: shape for leaf in leaves for name, shape in leaf.shapes.items()}
    dtypes = {name: dtype for leaf in leaves for name, dtype in leaf.dtypes.items()}
    return Leaf(shapes, 0 if whole is not None else leaves[0].axis + 1, read, write, dtypes)


def flipped(leaf: Leaf) -> Leaf:
    """The same leaf of tensors stored [in, out]."""

    def read(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        return leaf.read({name: tensors[name].T for name in leaf.shapes}, start, stop)

    def write(array: np.ndarray) -> dict[str, np.ndarray]:
        return {name: tensor.T for name, tensor in leaf.write(array).items()}

    return Leaf({name: shape[::-1] for name, shape in leaf.shapes.items()}, leaf.axis, read, write)


def transpose_into(out: np.ndarray, matrix: np.ndarray) -> None:
    """out[...] = matrix.T, a few rows at a time: numpy alone misses the cache at every element."""
    for row in range(0, matrix.shape[0], 16):
        out[:, row : row + 16] = matrix[row : row + 16].T


def contiguous(tensor: np.ndarray) -> np.ndarray:
    """A tensor that `Leaf.write` gave, which may be a transposed view, as C-ordered memory."""
    if tensor.flags.c_contiguous or tensor.ndim != 2:
        return np.ascontiguousarray(tensor)
    out = np.empty(tensor.shape, tensor.dtype)
    transpose_into(out, tensor.T)
    return out


def not_written(_: np.ndarray) -> dict[str, np.ndarray]:
    raise RuntimeError("a model that is quantised to int4 is not written: `save_params` refuses it")

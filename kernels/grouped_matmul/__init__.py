"""Rows times the weights of their experts: the products of a mixture of experts."""

import jax

from qjax.kernels.dispatch import dispatch
from qjax.kernels.grouped_matmul.groups import Groups, group_rows, tile_rows
from qjax.kernels.grouped_matmul.reference import grouped_matmul_ref
from qjax.kernels.grouped_matmul.routing import Routing, route

__all__ = ["Groups", "Routing", "group_rows", "grouped_matmul", "route", "tile_rows"]


def grouped_matmul(
    x: jax.Array, w: jax.Array, work: jax.Array, *, is_gated: bool = False, implementation: str | None = None
) -> jax.Array:
    """[R, N]: each tile of x's rows times the weights of its expert, in x's dtype; see `Groups` for rows and work list.

    Rows past the last tile hold anything. The reference has gradients, where x's padding rows are numbers.

    x     [R, D]         sorted by expert, each expert's rows padded to tiles
    w     [E, D, N]      or, `is_gated`, [E, D, 2, N]: the result is silu(x w[:, 0]) * (x w[:, 1])
    work  int32 [1 + W]  number of tiles, then the expert of each; a tile has R / W rows
    """
    if x.shape[1] != w.shape[1] or w.ndim != 3 + is_gated or x.shape[0] % (work.shape[0] - 1):
        raise ValueError(f"grouped_matmul: x {x.shape}, w {w.shape} and work {work.shape} do not fit")

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.grouped_matmul.mosaic_gpu import grouped_matmul_mosaic

        return grouped_matmul_mosaic(x, w, work, is_gated=is_gated, interpret=interpret)

    return dispatch(implementation, lambda: grouped_matmul_ref(x, w, work, is_gated=is_gated), mosaic)

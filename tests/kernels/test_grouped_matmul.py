"""Sorting rows by expert, and their products against float64: ties of tiles, empty experts, poisoned padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.grouped_matmul import Groups, group_rows, grouped_matmul
from qjax.kernels.grouped_matmul.groups import BLOCK, max_tiles, tile_rows
from qjax.kernels.grouped_matmul.mosaic_gpu import SMEM_BYTES, Plan, grouped_matmul_mosaic, plan

TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-6}  # of the largest number


def choices(T: int, k: int, E: int, seed: int = 0) -> np.ndarray:
    """[T, k]: different experts of each token, some never chosen, the first ones often."""
    rng = np.random.default_rng(seed)
    often = np.linspace(1, 0, E)[:, None] * 3
    never = np.arange(E)[:, None] % 3 == 2
    noise = np.where(never & (3 * k < E), -np.inf, often + rng.gumbel(size=(E, T)))
    return np.argsort(-noise, axis=0)[:k].T.astype(np.int32)


def check_groups(groups: Groups, experts: np.ndarray, E: int) -> None:
    T, k = experts.shape
    source, position, work = (np.asarray(x) for x in (groups.source, groups.position, groups.work))
    W, R = len(work) - 1, len(source)
    tile = R // W
    kept = (experts >= 0) & (experts < E)
    assert work[0] == sum(-(-np.sum(experts[kept] == e) // tile) for e in range(E)) <= W
    assert (work[1:] < E).all() and (np.diff(work[1 : 1 + work[0]]) >= 0).all()
    assert (position[~kept] == R).all() and len(set(position[kept].tolist())) == kept.sum()
    tokens = np.broadcast_to(np.arange(T)[:, None], (T, k))
    assert (source[position[kept]] == tokens[kept]).all()
    assert (work[1 + position[kept] // tile] == experts[kept]).all()
    assert np.sum(source < T) == kept.sum()  # the other rows are padding
    for e in range(E):  # in the order in which they came
        assert (np.diff(position[experts == e]) > 0).all()


@pytest.mark.parametrize("tile", [8, 64, None])
@pytest.mark.parametrize(("T", "k", "E"), [(1, 1, 1), (1, 8, 128), (7, 2, 4), (33, 8, 128), (300, 4, 16)])
def test_every_row_is_in_a_tile_of_its_expert(T: int, k: int, E: int, tile: int | None):
    experts = choices(T, k, E)
    check_groups(jax.jit(group_rows, static_argnums=(1, 2))(experts, E, tile), experts, E)


def test_more_rows_than_are_compared_at_once():
    experts = choices(2 * BLOCK + 37, 2, 16)
    check_groups(group_rows(jnp.asarray(experts), 16), experts, 16)


@pytest.mark.parametrize("fill", [-1, 4, 1000])
def test_dropped_rows_take_no_tile(fill: int):
    experts = choices(50, 2, 4)
    experts[10:] = fill
    groups = group_rows(jnp.asarray(experts), 4, 8)
    check_groups(groups, experts, 4)
    experts[:] = fill
    assert np.asarray(group_rows(jnp.asarray(experts), 4, 8).work)[0] == 0


def test_all_rows_to_one_expert_and_the_most_tiles_there_can_be():
    one = np.full((100, 1), 3, np.int32)
    check_groups(group_rows(jnp.asarray(one), 8, 16), one, 8)
    spread = np.array([[e] for e in [*range(8)] + [0] * 8], np.int32)  # 9 of one, one of each other
    groups = group_rows(jnp.asarray(spread), 8, 8)
    assert groups.work[0] == max_tiles(16, 8, 8) == 9
    check_groups(groups, spread, 8)


def test_tiles_are_about_twice_an_experts_share():
    assert [tile_rows(8 * T, 128) for T in (1, 32, 64, 128, 512, 8192)] == [8, 8, 8, 16, 64, 128]


def case(T: int, k: int, E: int, D: int, N: int, *, is_gated: bool, dtype: str, tile: int | None = None):
    """Arguments with NaN wherever nothing may be read, the rows that count, and what is expected of them."""
    rng = np.random.default_rng(1)
    experts = choices(T, k, E)
    groups = group_rows(jnp.asarray(experts), E, tile)
    tokens = rng.standard_normal((T, D), np.float32)
    x = jnp.asarray(np.concatenate([tokens, np.full((1, D), np.nan, np.float32)]), dtype)[groups.source]
    w = rng.standard_normal((E, D, 2, N) if is_gated else (E, D, N), np.float32) / D**0.5
    w[np.setdiff1d(np.arange(E), experts)] = np.nan
    w = jnp.asarray(w, dtype)
    rows = np.asarray(groups.position).reshape(-1)
    inputs = np.asarray(x[rows], np.float64)
    expected = np.stack(
        [np.tensordot(row, np.asarray(w[e], np.float64), 1) for row, e in zip(inputs, experts.ravel(), strict=True)]
    )
    if is_gated:
        gate, up = expected[:, 0], expected[:, 1]
        expected = gate / (1 + np.exp(-gate)) * up
    return x, w, groups.work, rows, expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("T", "tile"), [(1, None), (40, 8), (40, 64)])
def test_reference(T: int, tile: int | None, is_gated: bool, dtype: str):
    x, w, work, rows, expected = case(T, 2, 8, 64, 48, is_gated=is_gated, dtype=dtype, tile=tile)
    out = np.asarray(grouped_matmul(x, w, work, is_gated=is_gated), np.float64)[rows]
    assert np.abs(out - expected).max() < TOLERANCE[dtype] * np.abs(expected).max()


def test_gradients_are_those_of_the_dense_expansion():
    x, w, work, rows, _ = case(40, 2, 6, 16, 8, is_gated=True, dtype="float32", tile=8)
    x, w = jnp.nan_to_num(x), jnp.nan_to_num(w)
    experts = np.repeat(np.asarray(work[1:]), x.shape[0] // (len(work) - 1))
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((len(rows), 8)), jnp.float32)

    def dense(x, w):
        y = jnp.einsum("RD,RDSF->RSF", x[rows], w[experts[rows]], precision="highest")
        return jnp.sum(weight * jax.nn.silu(y[:, 0]) * y[:, 1])

    grouped = lambda x, w: jnp.sum(weight * grouped_matmul(x, w, work, is_gated=True)[rows])
    for got, expected in zip(jax.grad(grouped, (0, 1))(x, w), jax.grad(dense, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


INTERPRETED = [  # several turns of a block, fewer stages than steps, two warpgroups, an expert with two tiles
    (5, 2, 8, 192, 128, True, 8, Plan(1, 64, 2)),
    (24, 2, 6, 128, 128, False, 8, Plan(1, 128, 3)),
    (70, 2, 3, 128, 64, True, 128, Plan(2, 64, 2)),
]


@pytest.mark.parametrize(("T", "k", "E", "D", "N", "is_gated", "tile", "cut"), INTERPRETED, ids=str)
@pytest.mark.timeout(120)
def test_interpreted(T, k, E, D, N, is_gated, tile, cut):
    x, w, work, rows, expected = case(T, k, E, D, N, is_gated=is_gated, dtype="bfloat16", tile=tile)
    out = grouped_matmul_mosaic(x, w, work, is_gated=is_gated, interpret=True, cut=cut)
    out = np.asarray(out, np.float64)[rows]
    assert np.abs(out - expected).max() < TOLERANCE["bfloat16"] * np.abs(expected).max()


@pytest.mark.gpu
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("T", [1, 8, 128, 2000])
def test_kernel_on_a_gpu(T: int, is_gated: bool):
    x, w, work, rows, expected = case(T, 8, 32, 512, 768, is_gated=is_gated, dtype="bfloat16")
    out = np.asarray(grouped_matmul(x, w, work, is_gated=is_gated, implementation="mosaic_gpu"), np.float64)[rows]
    assert np.abs(out - expected).max() < TOLERANCE["bfloat16"] * np.abs(expected).max()


# 30B-A3B, 235B-A22B: D and F; tensor parallel leaves a share of F on each device.
@pytest.mark.parametrize(("D", "F"), [(2048, 768), (2048, 384), (2048, 192), (4096, 1536), (4096, 192)])
@pytest.mark.parametrize("tile", [8, 16, 32, 64, 128])
def test_every_cut_fits_shared_memory_and_covers_the_columns(tile: int, D: int, F: int):
    for columns, is_gated, depth in ((F, True, D), (D, False, F)):
        cut = plan(tile, depth, columns, is_gated)
        stage = (cut.num_warpgroups * 64 + (1 + is_gated) * cut.tile_n) * 128
        assert columns % cut.tile_n == 0 and cut.num_warpgroups * 64 >= tile and cut.num_stages >= 2
        assert cut.num_stages * stage + cut.num_warpgroups * 64 * 64 * 2 <= SMEM_BYTES
        assert cut.tile_n * (1 + is_gated) // 2 <= 128  # registers of a thread for the sums


def test_what_does_not_fit_is_refused():
    x, w, work = jnp.zeros((16, 64)), jnp.zeros((4, 64, 96)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="grouped_matmul"):
        grouped_matmul(x, w[:, :32], work)
    with pytest.raises(ValueError, match="grouped_matmul"):
        grouped_matmul(x, w, work, is_gated=True)
    with pytest.raises(NotImplementedError, match="a product with 96 columns"):
        grouped_matmul(x.astype("bfloat16"), w.astype("bfloat16"), work, implementation="interpret")
    with pytest.raises(NotImplementedError, match="float32"):
        grouped_matmul(x, w, work, implementation="interpret")

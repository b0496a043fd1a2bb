"""`paged_decode` and `paged_prefill`, every implementation against a float64 oracle on poisoned memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.paged_attention import paged_decode, paged_prefill
from qjax.kernels.paged_attention.reference import paged_prefill_ref
from tests.kernels.cases import E4M3, LAYER, Case, decode_cases, errors, is_close, make, narrow, oracle, prefill_cases

DECODE = decode_cases(most=77)
PREFILL = prefill_cases(most=90)
DECODE += narrow(DECODE[::3])
PREFILL += narrow(PREFILL[::3])
# The interpreter takes seconds a case: one whose table is wider than needed, with a padding row and a partial last
# tile; for prefill a block of rows that two chunks share, one with earlier tokens, and rows past the last chunk.
INTERPRETED_DECODE = [
    Case((70, 1, 0), heads=(4, 1, 128), page_size=32),
    Case((129,), heads=(7, 1, 64), page_size=128, extra_width=0),
]
INTERPRETED_PREFILL = [
    Case((100, 130), chunk_lens=(100, 30), heads=(1, 1, 64), page_size=64, extra_rows=10),
    Case((120,), chunk_lens=(20,), heads=(1, 1, 64), page_size=64, extra_width=0),  # once a deadlock
]
INTERPRETED = INTERPRETED_DECODE + INTERPRETED_PREFILL
INTERPRETED += narrow([INTERPRETED_DECODE[0], *INTERPRETED_PREFILL])
names = lambda case: case.name


def op_of(case: Case):
    return paged_decode if case.chunk_lens is None else paged_prefill


def run(case: Case, implementation: str) -> tuple[dict, np.ndarray]:
    args = make(case)
    return args, np.asarray(op_of(case)(**args, layer=LAYER, implementation=implementation))


def assert_matches_oracle(case: Case, implementation: str) -> None:
    args, out = run(case, implementation)
    assert out.dtype == args["q"].dtype
    assert is_close(out, oracle(args), case.dtype)


@pytest.mark.parametrize("case", DECODE + PREFILL, ids=names)
def test_reference(case: Case):
    assert_matches_oracle(case, "reference")


@pytest.mark.parametrize("case", [Case((77, 16, 0)), Case((77, 16), chunk_lens=(20, 16), page_size=64)], ids=names)
def test_reference_in_float32(case: Case):
    assert_matches_oracle(replace(case, dtype="float32"), "reference")


@pytest.mark.parametrize("case", INTERPRETED, ids=names)
@pytest.mark.timeout(120)
def test_interpreted(case: Case):
    """Races are detected too: the interpreter raises on them."""
    assert_matches_oracle(case, "interpret")


@pytest.mark.gpu
@pytest.mark.parametrize("case", DECODE + PREFILL, ids=names)
@pytest.mark.timeout(60)
def test_mosaic_gpu(case: Case):
    assert_matches_oracle(case, "mosaic_gpu")
    assert run(case, "mosaic_gpu")[1].tobytes() == run(case, "mosaic_gpu")[1].tobytes()


@pytest.mark.parametrize("num_tokens", [1100, 2000])
def test_reference_reads_long_contexts_in_blocks(num_tokens: int):
    """More than one block of pages, and a table that the blocks do not divide."""
    assert_matches_oracle(Case((num_tokens, 3, 0), dtype="float32"), "reference")
    assert_matches_oracle(Case((num_tokens, 3), chunk_lens=(20, 3), dtype="float32"), "reference")


@pytest.mark.parametrize("tile", [1, 8, 33])
def test_prefill_tile_does_not_change_the_result(tile: int):
    case = replace(PREFILL[0], dtype="float32")
    args = make(case)
    out = paged_prefill_ref(**args, layer=LAYER, scale=args["q"].shape[-1] ** -0.5, tile=tile)
    assert is_close(np.asarray(out), oracle(args), "float32")


def test_padding_rows_are_zero():
    args, out = run(Case((9, 0, 5)), "reference")
    assert not out[1].any()
    args, out = run(Case((20, 7), chunk_lens=(8, 7), extra_rows=6), "reference")
    assert not out[15:].any()
    assert out[:15].all(axis=(1, 2)).all()
    del args


def test_e4m3_cache_is_the_wide_one_with_its_numbers():
    """Over the same numbers in float32, scales multiplied in, the result is the same; `out_dtype` is kept."""
    for case in narrow([Case((70, 1, 0)), Case((70, 9), chunk_lens=(30, 2))]):
        args = make(case)
        wide = args["kv"].view(E4M3).astype(np.float32) * args["scales"][:, None, :, None, None]
        same = {**args, "kv": wide, "q": args["q"].astype(np.float32), "scales": None}
        out = op_of(case)(**args, layer=LAYER, implementation="reference", out_dtype=jnp.float32)
        expected = op_of(case)(**same, layer=LAYER, implementation="reference")
        assert out.dtype == jnp.float32 and errors(np.asarray(out), np.asarray(expected))[1] < 1e-6


def test_two_runs_are_bitwise_equal():
    for case in (DECODE[0], PREFILL[0]):
        assert run(case, "reference")[1].tobytes() == run(case, "reference")[1].tobytes()


def test_prefill_row_equals_decode_of_the_same_token():
    case = Case((50, 33), chunk_lens=(10, 33), dtype="float32")
    args = make(case)
    prefill = paged_prefill(**args, layer=LAYER, implementation="reference")
    last = args["query_starts"][1:] - 1
    decode_args = {name: args[name] for name in ("kv", "page_table", "context_lens")}
    decode = paged_decode(args["q"][last], **decode_args, layer=LAYER, implementation="reference")
    np.testing.assert_allclose(prefill[last], decode, rtol=1e-5, atol=1e-6)


def test_scale():
    for case in (Case((30,), dtype="float32"), Case((30,), chunk_lens=(5,), dtype="float32")):
        args = make(case)
        out = op_of(case)(**args, layer=LAYER, scale=0.3, implementation="reference")
        assert is_close(np.asarray(out), oracle(args, scale=0.3), "float32")


def test_memory_follows_the_tokens_not_the_table():
    """Prefill of 512 rows with a table for 32 768 tokens: scores for all of it would be 537 MB."""
    shape = jax.ShapeDtypeStruct
    args = (
        shape((512, 8, 64), jnp.float32),
        shape((1, 2, 64, 4, 64, 64), jnp.float32),
        shape((4, 512), jnp.int32),
        shape((4,), jnp.int32),
        shape((5,), jnp.int32),
    )
    f = lambda *args: paged_prefill(*args, layer=0, implementation="reference")
    assert jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes < 40e6


@pytest.mark.parametrize(
    ("case", "message"),
    [(Case((5,), dtype="float32"), "float32"), (Case((5,), heads=(2, 1, 80)), "head_dim 80")],
    ids=["dtype", "head_dim"],
)
def test_unsupported_case_raises_not_implemented(case: Case, message: str):
    for one in (case, replace(case, chunk_lens=(2,))):
        with pytest.raises(NotImplementedError, match=message):
            run(one, "mosaic_gpu")


def test_arguments_that_do_not_fit_are_refused():
    args = make(Case((5, 6)))
    with pytest.raises(ValueError, match="do not fit the cache"):
        paged_decode(**{**args, "q": args["q"].astype(np.float32)}, layer=LAYER)
    with pytest.raises(ValueError, match=r"scales \(2, 3\) do not fit"):
        paged_decode(**args, scales=np.ones((2, 3), np.float32), layer=LAYER)
    with pytest.raises(ValueError, match="query_starts"):
        paged_prefill(**args, query_starts=np.array([0, 1], np.int32), layer=LAYER)

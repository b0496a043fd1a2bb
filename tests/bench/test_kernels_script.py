"""`scripts/bench_kernels.py`: every operation runs, by its reference, at the shape of a tiny model."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from scripts import bench_kernels
from scripts.bench_floors import MODELS, PEAKS

TINY = dataclasses.replace(
    MODELS["Qwen3-0.6B"],
    hidden_size=128,
    intermediate_size=128,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=192,
)


def form(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.fixture
def small(monkeypatch):
    for name, value in {
        "ROWS": (2,),
        "PROMPT_ROWS": (),
        "DECODES": ((2, 80),),
        "PREFILLS": ((2, 70),),
        "COLD_BYTES": 1,
    }.items():
        monkeypatch.setattr(bench_kernels, name, value)


@pytest.mark.parametrize("operation", bench_kernels.OPERATIONS)
def test_every_operation_runs(operation, small):
    for case in itertools.islice(bench_kernels.OPERATIONS[operation](TINY, "reference"), 1 + (operation == "sampling")):
        state, out = jax.jit(case.run)(case.state, *case.args)
        values = [np.asarray(x, np.float32) for x in jax.tree.leaves((state, out))]
        assert values and all(np.isfinite(x).all() for x in values), case.name
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), case.state
        )
        assert case.work.bytes > 0


def test_bytes_and_operations(small):
    """Decode of 2 x 80 tokens: K and V of one head, queries and results of two. Products: the weight, x, the result."""
    (decode,) = bench_kernels.paged_decode(TINY, "reference")
    assert decode.work.bytes == 160 * 128 * 2 * 2 + 2 * 2 * (2 * 128) * 2 and decode.work.flops == 160 * 4 * 2 * 128
    o = next(c for c in bench_kernels.products(TINY, "reference") if c.name.startswith("o "))
    assert o.work.bytes == (256 * 128 + 2 * 256 + 2 * 128) * 2 and o.work.flops == 2 * 2 * 256 * 128
    int4 = next(c for c in bench_kernels.products(TINY, "reference", "int4") if c.name.startswith("int4 o "))
    assert int4.work.bytes == 256 * 128 / 2 + 2 * 128 * 4 + (2 * 256 + 2 * 128) * 2


def test_a_case_is_timed_and_told(small):
    (case,) = bench_kernels.paged_decode(TINY, "reference")
    assert bench_kernels.seconds_of(case) > 0
    line = bench_kernels.line_of(case, 1e-6, PEAKS["H100"])
    assert line["us"] == 1 and line["of_floor"] == pytest.approx(case.work.bytes / 3.0e12 / 1e-6, abs=1e-3)
    assert "of_floor" not in bench_kernels.line_of(case, 1e-6, None)
    assert "decode 2 x 80" in bench_kernels.row(json.loads(json.dumps(line | {"model": "m"})))


def test_the_output_layer_is_what_the_model_has(small):
    """0.6B's is its embedding, [V, D]."""
    head = next(c for c in bench_kernels.products(TINY, None) if c.name.startswith("head "))
    xs, ((weight,),) = head.args
    _, (logits,) = head.run(head.state, *head.args)
    expected = np.asarray(xs[0], np.float32) @ np.asarray(weight, np.float32).T
    assert logits.dtype == np.float32 and np.allclose(logits, expected, atol=1e-3) and head.count == 1

"""The model against transformers (tests/golden), against itself in chunks, and split over devices."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import sharding
from qjax.checkpoint.safetensors import load_params
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import Qwen3ForCausalLM, abstract_model, merge, split, split_heads
from scripts import bench_floors
from tests.models.stepper import Stepper, mesh_of
from tests.tiny import TINY

GOLDEN = Path(__file__).parent.parent / "golden"
EXPECTED = np.load(GOLDEN / "expected.npz")
MODELS = json.loads((GOLDEN / "made_with.json").read_text())["models"]
# Absolute; for bfloat16 as a share of the logits' standard deviation.
TOLERANCE = {"transformers, float32": 1e-4, "other order of sums, float32": 1e-5, "transformers, bfloat16": 0.1}


def stepper_of(name: str, tp: int = 1, num_seqs: int = 1, dtype: str = "float32") -> Stepper:
    config = ModelConfig.from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    modeldef, _ = abstract_model(config, dtype, mesh_of(tp))
    leaves = load_params(GOLDEN / name, config, mesh_of(tp), dtype, progress=False)
    return Stepper(config, mesh_of(tp), modeldef, leaves, num_seqs)


def golden(name: str) -> tuple[list[int], np.ndarray]:
    return EXPECTED[f"{name}.token_ids"].tolist(), EXPECTED[f"{name}.logits"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name):
    ids, expected = golden(name)
    logits = stepper_of(name).run({}, {0: ids})
    assert logits.dtype == np.float32
    assert expected.std() > 0.5  # the comparison sees something
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE["transformers, float32"])


@pytest.mark.parametrize("name", ["untied_gqa4", "yarn", "qwen2"])
def test_chunks_and_single_tokens_give_the_logits_of_the_whole_prompt(name):
    ids, expected = golden(name)
    chunked = stepper_of(name)
    logits = [chunked.run({}, {0: ids[:17]}), chunked.run({}, {0: ids[17:34]})]
    for token in ids[34:]:
        logits.append(chunked.run({0: token}, {}))
    np.testing.assert_allclose(np.concatenate(logits), expected, rtol=0, atol=TOLERANCE["transformers, float32"])


def test_sequences_of_a_mixed_step_do_not_see_each_other():
    ids, expected = golden("untied_gqa4")
    stepper = stepper_of("untied_gqa4", num_seqs=4)
    stepper.run({}, {0: ids[:16], 2: ids[:20]})
    logits = stepper.run({0: ids[16], 2: ids[20]}, {1: ids[:9], 3: ids[:23]}, pad_prefill=6)
    rows = [16, 20, *range(9), *range(23)]
    np.testing.assert_allclose(logits[: len(rows)], expected[rows], rtol=0, atol=TOLERANCE["transformers, float32"])
    assert np.isfinite(logits).all()  # padding rows too


def test_bfloat16_stays_near_float32():
    ids, expected = golden("untied_gqa4")
    logits = stepper_of("untied_gqa4", dtype="bfloat16").run({}, {0: ids})
    assert np.abs(logits - expected).max() < TOLERANCE["transformers, bfloat16"] * expected.std()


@pytest.mark.parametrize(("name", "tp"), [("tied_gqa2", 2), ("tied_gqa2", 4), ("untied_gqa4", 2)])
def test_tensor_parallel_gives_the_same_logits(name, tp):
    assert_same_logits_split(name, tp)


@pytest.mark.parametrize(("name", "tp"), [("untied_gqa4", 4), ("gqa8", 8), ("qwen2", 4)])
def test_more_devices_than_kv_heads_hold_copies_of_them(name, tp):
    config = ModelConfig.from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    assert tp > config.num_key_value_heads
    stepper = assert_same_logits_split(name, tp)
    assert stepper.cache.shape[3] == tp


@functools.cache
def logits_split(name: str, tp: int) -> tuple[Stepper, np.ndarray]:
    ids, _ = golden(name)
    stepper = stepper_of(name, tp)
    steps = [stepper.run({}, {0: ids[:18]}), stepper.run({}, {0: ids[18:36]}), stepper.run({0: ids[36]}, {})]
    return stepper, np.concatenate(steps)


def assert_same_logits_split(name: str, tp: int) -> Stepper:
    stepper, logits = logits_split(name, tp)
    np.testing.assert_allclose(logits, logits_split(name, 1)[1], rtol=0, atol=TOLERANCE["other order of sums, float32"])
    parts = {shard.data.shape[3] for shard in stepper.cache.addressable_shards}
    assert parts == {stepper.cache.shape[3] // tp}
    return stepper


@pytest.mark.parametrize(
    ("changes", "tp", "valid"),
    [
        ({}, 3, "1, 2, 4, 8, 16, 32"),
        ({"num_key_value_heads": 4, "num_attention_heads": 24}, 16, "1, 2, 4, 8"),
        ({"intermediate_size": 12290}, 4, "1, 2"),
    ],
)
def test_sizes_that_work_are_listed(changes: dict, tp: int, valid: str):
    config = dataclasses.replace(bench_floors.MODELS["Qwen3-8B"], **changes)
    with pytest.raises(ValueError, match=rf"tensor_parallel_size={tp} .* Sizes that work: {valid}\.$"):
        split_heads(config, tp)


def test_two_all_reduces_a_layer_and_one_for_the_embedding():
    stepper = stepper_of("untied_gqa4", tp=2)
    text = stepper.compiled_text(stepper.batch({}, {0: [3, 4, 5]}))
    count = lambda op: len(re.findall(rf" {op}(?:-start)?\(", text))
    assert count("all-reduce") == 2 * stepper.config.num_hidden_layers + 1
    assert count("all-gather") == 1  # the logits
    assert [count(op) for op in ("all-to-all", "collective-permute", "reduce-scatter")] == [0, 0, 0]


def test_no_weight_is_transposed_or_copied():
    stepper = stepper_of("untied_gqa4")
    batch = stepper.batch({}, {0: [3, 4, 5]})
    with jax.set_mesh(stepper.mesh):
        text = stepper.step.lower(stepper.leaves, stepper.cache, batch).as_text()
    contracted = re.findall(r"dot_general .*contracting_dims = \[[\d, ]*\] x \[([\d, ]*)\].*: \(tensor<3x", text)
    orders = [[int(axis) for axis in axes.split(", ")] for axes in contracted]
    assert orders == [[0]] * (4 * 2 + 1)  # o_proj sums over K, G, H in the order in which they lie


@pytest.mark.parametrize("tp", [1, 2])
def test_one_trace_a_shape(tp):
    stepper = stepper_of("untied_gqa4", tp)
    for token in range(4):
        stepper.run({0: token}, {})
    assert stepper.num_traces == 1
    stepper.run({}, {0: [7, 8]})
    assert stepper.num_traces == 2


def test_leaves_are_few_named_and_in_one_order():
    stepper = stepper_of("untied_gqa4")
    paths = stepper.modeldef.paths
    assert len(paths) == len(set(paths)) == len(stepper.leaves) == 8 * stepper.config.num_hidden_layers + 3
    assert "layers.1.self_attn.qkv_proj.kernel" in paths
    with jax.set_mesh(stepper.mesh):
        modeldef, leaves = split(merge(stepper.modeldef, stepper.leaves))
    assert modeldef.paths == paths
    assert all(a is b for a, b in zip(leaves, stepper.leaves, strict=True))


@pytest.mark.parametrize("tp", [1, 4])
def test_a_model_built_with_random_weights_is_the_abstract_one_filled(tp):
    config = ModelConfig.from_hf(TINY)
    abstract, shapes = abstract_model(config, "bfloat16", mesh_of(tp))
    with jax.set_mesh(mesh_of(tp)):
        model = Qwen3ForCausalLM(config, dtype=jnp.bfloat16, tensor_parallel_size=tp, rngs=nnx.Rngs(0))
    modeldef, leaves = split(model)
    assert modeldef == abstract and hash(modeldef) == hash(abstract)
    assert [(x.shape, x.dtype, x.sharding) for x in leaves] == [(x.shape, x.dtype, x.sharding) for x in shapes]


def test_layers_stay_in_order_past_ten():
    config = ModelConfig("Qwen3ForCausalLM", 16, 8, 8, 12, 2, 1, 4, 64)
    modeldef, _ = abstract_model(config, "float32", mesh_of(1))
    layers = [int(path.split(".")[1]) for path in modeldef.paths if path.startswith("layers.")]
    assert layers == sorted(layers) and set(layers) == set(range(12))


@pytest.mark.parametrize(
    ("tp", "sizes", "named"),
    [
        (8, {}, "num_attention_heads=4"),
        (4, {"intermediate_size": 98}, "intermediate_size=98"),
        (4, {"vocab_size": 158}, "vocab_size=158"),
        (3, {"vocab_size": 159, "num_attention_heads": 12, "num_key_value_heads": 2}, "num_key_value_heads=2"),
    ],
)
def test_sizes_that_do_not_split_are_refused_by_name(tp, sizes, named):
    shape = {"vocab_size": 160, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2} | sizes
    config = ModelConfig(
        "Qwen3ForCausalLM", hidden_size=64, num_hidden_layers=1, head_dim=16, max_position_embeddings=64, **shape
    )
    with pytest.raises(ValueError, match=rf"tensor_parallel_size={tp}.*{named}"):
        abstract_model(config, "float32", mesh_of(tp))


def test_a_mesh_needs_its_devices():
    with pytest.raises(ValueError, match="tensor_parallel_size=9, but 8 device"):
        sharding.make_mesh(9)

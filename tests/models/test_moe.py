"""Mixtures of experts against transformers (tests/golden), against themselves in chunks, and split over devices."""

import json
import re

import jax
import numpy as np
import pytest

from qjax import sharding
from qjax.checkpoint.safetensors import load_params
from qjax.models.batch import Batch
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import abstract_model
from tests.models.stepper import Stepper, mesh_of
from tests.models.test_qwen3 import GOLDEN, TOLERANCE

EXPECTED = np.load(GOLDEN / "moe.npz")
NAMES = json.loads((GOLDEN / "made_with.json").read_text())["moe_models"]
EQUAL, UNCHOSEN = [(3, 5), (9, 2)], 7  # experts of moe_sparse: see scripts/make_golden.py
# Qwen/Qwen3-30B-A3B and 235B-A22B
LARGE: dict = {"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048}
LARGE |= {"intermediate_size": 6144, "num_hidden_layers": 48, "max_position_embeddings": 40960}
LARGE |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
LARGE |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
LARGE |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
LARGER = LARGE | {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536}
LARGER |= {"num_hidden_layers": 94, "num_attention_heads": 64}


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((GOLDEN / name / "config.json").read_text()))


def stepper_of(
    name: str, tp: int = 1, num_seqs: int = 1, dtype: str = "float32", *, expert_parallel: bool = False
) -> Stepper:
    config = config_of(name)
    if expert_parallel:
        config = config.with_expert_parallel(tp)
    modeldef, _ = abstract_model(config, dtype, mesh_of(tp))
    leaves = load_params(GOLDEN / name, config, mesh_of(tp), dtype, progress=False)
    return Stepper(config, mesh_of(tp), modeldef, leaves, num_seqs)


def golden(name: str) -> tuple[list[int], np.ndarray]:
    return EXPECTED[f"{name}.token_ids"].tolist(), EXPECTED[f"{name}.logits"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name):
    ids, expected = golden(name)
    assert expected.std() > 0.5  # the comparison sees something
    logits = stepper_of(name).run({}, {0: ids})
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE["transformers, float32"])


def test_which_layers_are_sparse():
    config = config_of("moe_mixed")
    assert [config.is_sparse(layer) for layer in range(4)] == [False, True, False, False]
    paths = abstract_model(config, "float32", mesh_of(1))[0].paths
    assert [path for path in paths if ".experts." in path] == [
        *("layers.1.mlp.experts.down_proj.kernel", "layers.1.mlp.experts.gate_up_proj.kernel"),
    ]
    assert config_of("moe_sparse").num_sparse_layers == 2


def test_chunks_and_single_tokens_give_the_logits_of_the_whole_prompt():
    name = "moe_sparse"
    ids, expected = golden(name)
    chunked = stepper_of(name)
    logits = [chunked.run({}, {0: ids[:17]}), chunked.run({}, {0: ids[17:34]})]
    for token in ids[34:]:
        logits.append(chunked.run({0: token}, {}))
    np.testing.assert_allclose(np.concatenate(logits), expected, rtol=0, atol=TOLERANCE["transformers, float32"])


def test_sequences_of_a_mixed_step_do_not_see_each_other():
    ids, expected = golden("moe_sparse")
    stepper = stepper_of("moe_sparse", num_seqs=4)
    stepper.run({}, {0: ids[:16], 2: ids[:20]})
    logits = stepper.run({0: ids[16], 2: ids[20]}, {1: ids[:9], 3: ids[:23]}, pad_prefill=6)
    rows = [16, 20, *range(9), *range(23)]
    np.testing.assert_allclose(logits[: len(rows)], expected[rows], rtol=0, atol=TOLERANCE["transformers, float32"])
    assert np.isfinite(logits).all()  # padding rows too


def test_bfloat16_stays_near_float32():
    """Of most tokens: rounding may send one whose experts are nearly equal to another expert."""
    ids, expected = golden("moe_sparse")
    logits = stepper_of("moe_sparse", dtype="bfloat16").run({}, {0: ids})
    worst = np.abs(logits - expected).max(axis=1)
    assert np.quantile(worst, 0.8) < TOLERANCE["transformers, bfloat16"] * expected.std()


@pytest.mark.parametrize(("name", "tp"), [("moe_mixed", 2), ("moe_sparse", 4)])
def test_tensor_parallel_gives_the_same_logits(name, tp):
    ids, expected = golden(name)
    stepper = stepper_of(name, tp)
    np.testing.assert_allclose(stepper.run({}, {0: ids}), expected, rtol=0, atol=TOLERANCE["transformers, float32"])
    leaves = dict(zip(stepper.modeldef.paths, stepper.leaves, strict=True))
    experts, F = "layers.1.mlp.experts", stepper.config.moe_intermediate_size
    for path, axis in ((f"{experts}.gate_up_proj.kernel", 3), (f"{experts}.down_proj.kernel", 1)):
        assert {shard.data.shape[axis] for shard in leaves[path].addressable_shards} == {F // tp}


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", ["moe_mixed", "moe_sparse"])
def test_expert_parallel_gives_the_same_logits(name, tp):
    """Ties and experts that nobody chooses included; decode rows with padding, too."""
    ids, expected = golden(name)
    stepper = stepper_of(name, tp, expert_parallel=True)
    leaves = dict(zip(stepper.modeldef.paths, stepper.leaves, strict=True))
    config = stepper.config
    for path in ("gate_up_proj", "down_proj"):
        shards = leaves[f"layers.1.mlp.experts.{path}.kernel"].addressable_shards
        assert {shard.data.shape[0] for shard in shards} == {config.num_experts // tp}
        assert config.moe_intermediate_size in shards[0].data.shape
    logits = [stepper.run({}, {0: ids[:-1]}, pad_prefill=3)[: len(ids) - 1], stepper.run({0: ids[-1]}, {})]
    np.testing.assert_allclose(np.concatenate(logits), expected, rtol=0, atol=TOLERANCE["transformers, float32"])


def test_experts_that_cannot_be_shared_are_named():
    message = r"tensor_parallel_size=3 does not divide num_experts=8. Sizes that work: 1, 2, 4, 8."
    with pytest.raises(ValueError, match=message):
        config_of("moe_mixed").with_expert_parallel(3)
    dense = ModelConfig.from_hf(json.loads((GOLDEN / "gqa8" / "config.json").read_text()))
    with pytest.raises(ValueError, match=r"enable_expert_parallel: the model \(Qwen3ForCausalLM\) has no experts"):
        dense.with_expert_parallel(2)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_two_all_reduces_a_layer_and_one_for_the_embedding(expert_parallel):
    stepper = stepper_of("moe_mixed", tp=2, expert_parallel=expert_parallel)
    text = stepper.compiled_text(stepper.batch({}, {0: [3, 4, 5]}))
    count = lambda op: len(re.findall(rf" {op}(?:-start)?\(", text))
    assert count("all-reduce") == 2 * stepper.config.num_hidden_layers + 1
    assert [count(op) for op in ("all-to-all", "collective-permute", "reduce-scatter")] == [0, 0, 0]


def routing(name: str) -> np.ndarray:
    """The experts of each token in all sparse layers together, [layers * T, k]."""
    ids, _ = golden(name)
    stepper, chosen = stepper_of(name), []

    class Watched(Batch):
        def after_routing(self, probs, experts, cache):
            jax.debug.callback(lambda e: chosen.append(np.asarray(e)), experts)
            return cache

    jax.tree_util.register_dataclass(Watched)
    batch = stepper.batch({}, {0: ids})
    watched = Watched(batch.token_ids, batch.positions, batch.slots, batch.decode, batch.prefill)
    with jax.set_mesh(stepper.mesh):
        jax.block_until_ready(stepper.step(stepper.leaves, stepper.cache, watched))
    jax.effects_barrier()
    return np.concatenate(chosen)


def test_the_golden_model_has_ties_and_an_expert_that_nobody_chooses():
    chosen = routing("moe_sparse")
    assert not (chosen == UNCHOSEN).any()
    one_of_two = [((chosen == a).any(1) != (chosen == b).any(1)).sum() for a, b in EQUAL]
    assert sum(one_of_two) > 0  # only one of two equal experts is among the chosen
    for a, b in EQUAL:  # the first of them
        has_a, has_b = (chosen == a).any(1), (chosen == b).any(1)
        assert (has_a | ~has_b).all() if a < b else (has_b | ~has_a).all()


def test_a_row_that_is_no_number_stays_in_its_row():
    """Its logits are NaN, by which the engine ends its request, and no other row's change."""
    name = "moe_sparse"
    ids, expected = golden(name)
    stepper = stepper_of(name, num_seqs=2)
    leaves = list(stepper.leaves)
    where = stepper.modeldef.paths.index("embed_tokens.weight")
    unused = next(token for token in range(96) if token not in ids)
    embedding = np.asarray(leaves[where]).copy()
    embedding[unused] = np.nan
    leaves[where] = jax.device_put(embedding, leaves[where].sharding)
    stepper.leaves = tuple(leaves)
    hidden = stepper.run({}, {0: ids[:9], 1: [unused, unused]})
    columns = np.arange(96) != unused  # the output layer is the embedding
    np.testing.assert_allclose(hidden[:9, columns], expected[:9, columns], rtol=0, atol=1e-4)
    assert np.isnan(hidden[9:]).all()


def test_sizes_of_the_published_models():
    large, larger = ModelConfig.from_hf(LARGE), ModelConfig.from_hf(LARGER)
    assert round(large.num_params / 1e9, 1) == 30.5 and round(large.num_active_params / 1e9, 2) == 3.35
    assert round(larger.num_params / 1e9) == 235 and round(larger.num_active_params / 1e9) == 22
    modeldef, leaves = abstract_model(ModelConfig.from_hf(LARGE | {"num_hidden_layers": 1}), "bfloat16", mesh_of(4))
    shapes = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in zip(modeldef.paths, leaves, strict=True)}
    assert shapes["layers.0.mlp.experts.gate_up_proj.kernel"] == (128, 2048, 2, 192)
    assert shapes["layers.0.mlp.experts.down_proj.kernel"] == (128, 192, 2048)
    assert shapes["layers.0.mlp.gate.kernel"] == (2048, 128)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted(name):
    _, leaves = abstract_model(config_of(name), "float32", mesh_of(1))
    assert config_of(name).num_params == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_names_of_the_number_of_experts(key):
    hf = {name: value for name, value in LARGE.items() if name != "num_experts"}
    assert ModelConfig.from_hf(hf | {key: 64}).num_experts == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts is missing"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be a whole number above 0, got 0"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok=129 is more than num_experts=128"),
        ({"decoder_sparse_step": -1}, "decoder_sparse_step must be a whole number above 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_hf(LARGE | changes)


def test_experts_that_do_not_split_are_refused_by_name():
    config = ModelConfig.from_hf(LARGE | {"num_hidden_layers": 1, "moe_intermediate_size": 770})
    with pytest.raises(ValueError, match="tensor_parallel_size=4 does not divide moe_intermediate_size=770"):
        abstract_model(config, "float32", sharding.make_mesh(4))

"""FP8 and AWQ checkpoints: the numbers of their formulas, the logits of the dequantised model, errors by name."""

import dataclasses
import functools
import json
import operator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qjax import sharding
from qjax.checkpoint.safetensors import dummy_params, load_params, open_folder, save_params
from qjax.engine.weights import check_weights
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import abstract_model, merge
from qjax.quantization.dequantize import dequantize, dequantize_awq, dequantize_fp8, unpack_awq
from tests.models.stepper import Stepper, mesh_of
from tests.quantization.checkpoints import CONFIG, QUANTIZATION, quantize_awq, quantize_fp8, write_pair
from tests.tiny import TINY

IDS = np.random.default_rng(3).integers(3, 160, 40).tolist()
METHODS = ["fp8", "awq"]


def config_of(folder) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))


def tiny(method: str, **changes) -> ModelConfig:
    return ModelConfig.from_hf(TINY | CONFIG | {"quantization_config": QUANTIZATION[method]} | changes)


def logits_of(folder, tp: int = 1, dtype: str = "float32") -> np.ndarray:
    config, mesh = config_of(folder), mesh_of(tp)
    modeldef, _ = abstract_model(config, dtype, mesh)
    leaves = load_params(folder, config, mesh, dtype, progress=False)
    return Stepper(config, mesh, modeldef, leaves).run({}, {0: IDS})


plain_logits = functools.cache(logits_of)


@pytest.fixture(scope="module", params=METHODS)
def pair(request, tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp(request.param), request.param)


def test_awq_words_by_hand():
    """Nibbles from the lowest: columns 0, 2, 4, 6, 1, 3, 5, 7."""
    assert unpack_awq(jnp.array([0x76543210], jnp.int32)).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    negative = np.array([[0xF0000001]], np.uint32).view(np.int32)
    assert unpack_awq(jnp.asarray(negative)).tolist() == [[1, 0, 0, 0, 0, 0, 0, 15]]
    # One group of two inputs, zero point 8 in every column but column 1, where it is 3.
    qweight = np.array([[0x00000000], [0xFFFFFFFF]], np.uint32).view(np.int32)
    qzeros = np.array([[0x88838888]], np.uint32).view(np.int32)
    scales = np.array([[1, 2, 0.5, 1, 1, 1, 1, 1]], np.float32)
    numbers = dequantize_awq(jnp.asarray(qweight), jnp.asarray(qzeros), jnp.asarray(scales), jnp.float32)
    assert numbers.tolist() == [[-8, -6, -4, -8, -8, -8, -8, -8], [7, 24, 3.5, 7, 7, 7, 7, 7]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_formulas_bit_by_bit(dtype):
    weight = np.random.default_rng(0).standard_normal((256, 384), np.float32)
    parts, numbers = quantize_fp8(weight)
    found = dequantize_fp8(jnp.asarray(parts["weight"]), jnp.float32(parts["weight_scale_inv"]), dtype)
    np.testing.assert_array_equal(np.asarray(found), numbers.astype(ml_dtypes.bfloat16 if dtype != "float32" else "f4"))
    parts, numbers = quantize_awq(weight)
    tensors = (jnp.asarray(parts["qweight"]), jnp.asarray(parts["qzeros"]), jnp.float32(parts["scales"]))
    found = dequantize_awq(*tensors, dtype)
    expected = numbers.T.astype(ml_dtypes.bfloat16 if dtype != "float32" else "f4")
    np.testing.assert_array_equal(np.asarray(found), expected)
    assert np.abs(numbers - weight).max() < 0.3  # the test's own rounding is what it says


def test_loaded_weights_are_the_dequantised_ones(pair):
    """Every projection of the last layer, bit by bit."""
    layers = []
    for folder in pair:
        modeldef, _ = abstract_model(config_of(folder), "float32", mesh_of(1))
        leaves = load_params(folder, config_of(folder), mesh_of(1), "float32", progress=False)
        layers.append(merge(modeldef, leaves).layers[-1])
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        found, expected = (operator.attrgetter(name)(layer) for layer in layers)
        if "fp8" in pair[0].name:
            tensors = {"weight": found.weight[...], "weight_scale_inv": found.weight_scale_inv[...]}
            numbers = np.asarray(dequantize("fp8", tensors, jnp.float32))  # [*outputs, *inputs]
            weight = np.moveaxis(numbers, range(-len(found.in_axes), 0), range(len(found.in_axes)))
        else:
            with jax.set_mesh(mesh_of(1)):
                weight = jax.jit(lambda module=found: module.weight(jnp.float32))()
        np.testing.assert_array_equal(np.asarray(weight), np.asarray(expected.kernel[...]), err_msg=name)


@pytest.mark.parametrize("tp", [1, 2, 4])  # 4: each of the two KV heads is there twice
def test_logits_equal_those_of_the_dequantised_model(pair, tp):
    quantised, plain = pair
    expected = plain_logits(plain)
    assert expected.std() > 0.3
    np.testing.assert_allclose(logits_of(quantised, tp), expected, rtol=0, atol=1e-4)


def test_bfloat16(pair):
    quantised, plain = pair
    expected = logits_of(plain, dtype="bfloat16")  # its weights are the same, rounded once
    np.testing.assert_allclose(logits_of(quantised, dtype="bfloat16"), expected, rtol=0, atol=0.02 * expected.std())


def test_modules_to_not_convert(tmp_path):
    skip = (*(f"model.layers.0.self_attn.{x}_proj" for x in "qkv"), "model.layers.1.mlp.down_proj")
    quantised, plain = write_pair(tmp_path, "fp8", skip)
    modeldef, _ = abstract_model(config_of(quantised), "float32", mesh_of(1))
    assert "layers.0.self_attn.qkv_proj.weight_scale_inv" not in modeldef.paths
    np.testing.assert_allclose(logits_of(quantised), logits_of(plain), rtol=0, atol=1e-4)


def test_names_to_not_convert_end_at_dots():
    quantization = QUANTIZATION["fp8"] | {"modules_to_not_convert": ["lm_head", "model.layers.1", "mlp.gate"]}
    own = tiny("fp8", quantization_config=quantization).quantization
    assert own is not None
    assert own.covers("model.layers.10.mlp.gate_up_proj") and not own.covers("model.layers.1.mlp.gate_up_proj")
    half = QUANTIZATION["fp8"] | {"ignored_layers": ["model.layers.0.self_attn.q_proj"]}
    with pytest.raises(ValueError, match=r"has model.layers.0.self_attn.q_proj, but not all of .*v_proj"):
        abstract_model(tiny("fp8", quantization_config=half), "float32", mesh_of(1))


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("fp8", {"quant_method": "gptq"}, r"quant_method='gptq' is not supported. Supported: .*'fp8'.*'awq'"),
        ("fp8", {"quant_method": None}, "quant_method=None"),
        ("fp8", {"fmt": "e5m2"}, "fmt='e5m2'"),
        ("fp8", {"activation_scheme": "static"}, "activation_scheme='static'"),
        ("fp8", {"weight_block_size": None}, "weight_block_size=None"),
        ("fp8", {"weight_block_size": [64, 128]}, "weight_block_size"),
        ("awq", {"bits": 8}, "bits=8"),
        ("awq", {"group_size": 64}, "group_size=64"),
        ("awq", {"zero_point": False}, "zero_point=False"),
        ("awq", {"version": "gemv"}, "version='gemv'"),
    ],
)
def test_other_kinds_are_refused_by_name(method, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(method, quantization_config=QUANTIZATION[method] | changes)
    assert "Supported:" in str(error.value)


def test_version_may_be_in_capitals():
    assert tiny("awq", quantization_config=QUANTIZATION["awq"] | {"version": "GEMM"}).quantization is not None


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({"head_dim": 64}, 1, "head_dim=64 is no multiple of 128"),
        ({"hidden_size": 192}, 1, "hidden_size=192 is no multiple of 128"),
        ({"intermediate_size": 320}, 1, r"intermediate_size=320 is no multiple of 128"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_sizes_of_no_whole_groups(method, changes, tp, message):
    with pytest.raises(ValueError, match=message):
        abstract_model(tiny(method, **changes), "float32", mesh_of(tp))


def test_awq_groups_are_never_split():
    message = r"intermediate_size=384 is no multiple of 128 × tensor_parallel_size=2"
    with pytest.raises(ValueError, match=message):
        abstract_model(tiny("awq", intermediate_size=384), "float32", mesh_of(2))


@pytest.mark.parametrize("method", METHODS)
def test_the_option_must_be_the_checkpoints(method):
    other = METHODS[METHODS.index(method) - 1]
    tiny(method).check_quantization(None)
    tiny(method).check_quantization(method)
    with pytest.raises(ValueError, match=f"quantization='{other}', but the checkpoint is quantised by '{method}'"):
        tiny(method).check_quantization(other)
    with pytest.raises(ValueError, match="the checkpoint is not quantised"):
        ModelConfig.from_hf(TINY).check_quantization(method)


def test_wrong_tensors_are_named(tmp_path, pair):
    quantised, _ = pair
    config = config_of(quantised)
    tensors = dict(open_folder(quantised))
    scale = "weight_scale_inv" if "fp8" in quantised.name else "scales"
    weight = "weight" if "fp8" in quantised.name else "qweight"
    name = "model.layers.1.mlp.up_proj."

    def load(changed):
        save_file({k: v for k, v in changed.items() if v is not None}, tmp_path / "model.safetensors")
        load_params(tmp_path, config, mesh_of(1), "float32", progress=False)

    with pytest.raises(ValueError, match=rf"tensor {name}{scale} \[.*\] is missing"):
        load(tensors | {name + scale: None})
    with pytest.raises(ValueError, match=rf"tensor {name}{scale} has shape"):
        load(tensors | {name + scale: tensors[name + scale][:-1]})
    with pytest.raises(ValueError, match=rf"tensor {name}{weight} has dtype bfloat16, expected (float8_e4m3fn|int32)"):
        load(tensors | {name + weight: np.zeros(tensors[name + weight].shape, ml_dtypes.bfloat16)})
    embedding = "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=rf"tensor {embedding} has dtype int32, expected bfloat16"):
        load(tensors | {embedding: tensors[embedding].astype(np.int32)})


@pytest.mark.parametrize("method", METHODS)
def test_dummy_weights_are_about_normal(method):
    """One projection of a model, on one device and on two."""
    made = []
    for tp in (1, 2):
        modeldef, leaves = abstract_model(tiny(method), "float32", mesh_of(tp))
        chosen = {p: leaf for p, leaf in zip(modeldef.paths, leaves, strict=True) if "1.mlp.down_proj" in p}
        modeldef = dataclasses.replace(modeldef, paths=tuple(chosen))
        arrays = dummy_params(chosen.values(), modeldef)
        made.append({p.rpartition(".")[2]: np.asarray(x) for p, x in zip(chosen, arrays, strict=True)})
    for name in made[0]:
        np.testing.assert_array_equal(made[0][name], made[1][name])
    weight = np.asarray(dequantize(method, {name: jnp.asarray(x) for name, x in made[0].items()}, "float32"))
    assert 0.018 < weight.std() < 0.022 and abs(weight.mean()) < 0.003


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_bytes_are_those_of_the_arrays(method, dtype):
    _, leaves = abstract_model(tiny(method), dtype, mesh_of(1))
    assert tiny(method).weights_bytes(jnp.dtype(dtype).itemsize) == sum(
        leaf.size * leaf.dtype.itemsize for leaf in leaves
    )


def test_new_weights_must_be_quantised_alike(pair):
    quantised, _ = pair
    config = config_of(quantised)
    modeldef, _ = abstract_model(config, "float32", mesh_of(1))
    leaves = load_params(quantised, config, mesh_of(1), "float32", progress=False)
    check_weights(leaves, leaves, modeldef.paths)
    with pytest.raises(ValueError, match=r"params: layers.0.mlp.down_proj.\w+ has dtype bfloat16, .*quantised"):
        check_weights(leaves, [leaf.astype(jnp.bfloat16) for leaf in leaves], modeldef.paths)
    with pytest.raises(ValueError, match="save_params: the model is quantised"):
        save_params(leaves, config, quantised, sharding.make_mesh(1))

"""FP8, AWQ and GPTQ checkpoints: the numbers of their formulas, the logits of the dequantised model, errors by name."""

import dataclasses
import functools
import json
import math
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
from qjax.kernels.fp8_matmul.reference import dequantize as dequantize_fp8
from qjax.kernels.int4_matmul import dequantize as dequantize_int4
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import abstract_model, merge
from qjax.quantization.int4 import repack_scales, repack_weights
from tests.models.stepper import Stepper, mesh_of
from tests.quantization.checkpoints import CONFIG, QUANTIZATION, QUANTIZE, write_pair
from tests.tiny import TINY

IDS = np.random.default_rng(3).integers(3, 160, 40).tolist()
METHODS = ["fp8", "awq", "gptq"]


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


def int4_numbers(qweight, qzeros, scales, method: str, dtype="float32") -> np.ndarray:
    """[out, in] of a checkpoint's tensors."""
    words, scales_zeros = repack_weights(qweight, method), repack_scales(qzeros, scales, method)
    return np.asarray(dequantize_int4(jnp.asarray(words), jnp.asarray(scales_zeros), dtype))


def test_int4_words_by_hand():
    """AWQ's nibbles from the lowest are columns 0, 2, 4, 6, 1, 3, 5, 7; GPTQ's are in order, its zero points less 1."""
    uint32 = lambda *words: np.array([words], np.uint32).view(np.int32)
    column_of_nibble = {"awq": (0, 2, 4, 6, 1, 3, 5, 7), "gptq": range(8)}
    for method, order in column_of_nibble.items():
        zeros = repack_scales(uint32(0x76543210, 0xF0000001), np.ones((1, 16), np.float16), method)[0] & 31
        values = (0, 1, 2, 3, 4, 5, 6, 7), (1, 0, 0, 0, 0, 0, 0, 15)
        expected = np.empty((2, 8), int)
        expected[:, list(order)] = np.array(values) + (method == "gptq")
        assert zeros.tolist() == expected.reshape(-1).tolist()
    ones, scales = np.full((1, 8), 0x11111111, np.int32), np.ones((1, 64), np.float16)  # zero points 1; of GPTQ 2
    awq = np.zeros((128, 8), np.int32)
    awq[5, 2] = 0x00A00000  # nibble 5: column 3 of the third word
    found = int4_numbers(awq, ones, scales, "awq")
    assert found[19, 5] == 9 and (found == -1).sum() == found.size - 1
    gptq = np.zeros((16, 64), np.int32)
    gptq[3, 19] = 0x00A00000  # input 5 of the fourth eight
    found = int4_numbers(gptq, ones, scales, "gptq")
    assert found[19, 29] == 8 and (found == -2).sum() == found.size - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_formulas_bit_by_bit(method, dtype):
    weight = np.random.default_rng(0).standard_normal((256, 384), np.float32)
    parts, numbers = QUANTIZE[method](weight)
    if method == "fp8":
        found = dequantize_fp8(jnp.asarray(parts["weight"]), jnp.float32(parts["weight_scale_inv"]), dtype)
    else:
        found = int4_numbers(parts["qweight"], parts["qzeros"], parts["scales"], method, dtype)
    expected = numbers.astype(ml_dtypes.bfloat16 if dtype != "float32" else "f4")
    np.testing.assert_array_equal(np.asarray(found), expected)
    assert np.abs(numbers - weight).max() < 0.4  # the test's own rounding is what it says


def numbers_of(tensors: dict[str, jax.Array], num_inputs: int, dtype="float32") -> np.ndarray:
    """A projection's parameters by name, as the kernel [*inputs, *outputs]."""
    if "words" not in tensors:
        numbers = np.asarray(dequantize_fp8(tensors["weight"], tensors["weight_scale_inv"], dtype))
        return np.moveaxis(numbers, range(-num_inputs, 0), range(num_inputs))  # of [*outputs, *inputs]
    words, scales_zeros = tensors["words"], tensors["scales_zeros"]
    groups, outputs = scales_zeros.shape[:num_inputs], scales_zeros.shape[num_inputs:]
    flat = words.reshape(math.prod(groups), -1, words.shape[-1]), scales_zeros.reshape(math.prod(groups), -1)
    return np.asarray(dequantize_int4(*flat, dtype)).T.reshape(*groups[:-1], groups[-1] * 128, *outputs)


def test_loaded_weights_are_the_dequantised_ones(pair):
    """Every projection of the last layer, bit by bit."""
    layers = []
    for folder in pair:
        modeldef, _ = abstract_model(config_of(folder), "float32", mesh_of(1))
        leaves = load_params(folder, config_of(folder), mesh_of(1), "float32", progress=False)
        layers.append(merge(modeldef, leaves).layers[-1])
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        found, expected = (operator.attrgetter(name)(layer) for layer in layers)
        names = ("weight", "weight_scale_inv") if "fp8" in pair[0].name else ("words", "scales_zeros")
        tensors = {name: jnp.asarray(np.asarray(getattr(found, name)[...])) for name in names}
        weight = numbers_of(tensors, len(found.in_axes))
        np.testing.assert_array_equal(weight, np.asarray(expected.kernel[...]), err_msg=name)


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
        ("fp8", {"quant_method": "hqq"}, r"quant_method='hqq' is not supported. Supported: .*'fp8'.*'awq'.*'gptq'"),
        ("fp8", {"quant_method": None}, "quant_method=None"),
        ("fp8", {"fmt": "e5m2"}, "fmt='e5m2'"),
        ("fp8", {"activation_scheme": "static"}, "activation_scheme='static'"),
        ("fp8", {"weight_block_size": None}, "weight_block_size=None"),
        ("fp8", {"weight_block_size": [64, 128]}, "weight_block_size"),
        ("awq", {"bits": 8}, "bits=8"),
        ("awq", {"group_size": 64}, "group_size=64"),
        ("awq", {"zero_point": False}, "zero_point=False"),
        ("awq", {"version": "gemv"}, "version='gemv'"),
        ("gptq", {"bits": 8}, "bits=8"),
        ("gptq", {"group_size": -1}, "group_size=-1"),
        ("gptq", {"desc_act": True}, "desc_act=True"),
        ("gptq", {"sym": False}, "sym=False"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, "checkpoint_format='gptq_v2'"),
        ("gptq", {"lm_head": True}, "lm_head=True"),
        ("gptq", {"dynamic": {"-:.*down_proj": {}}}, "dynamic="),
    ],
)
def test_other_kinds_are_refused_by_name(method, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(method, quantization_config=QUANTIZATION[method] | changes)
    assert "Supported:" in str(error.value)


@pytest.mark.parametrize(
    "other",
    [
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "gguf"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "mxfp4"},
    ],
    ids=lambda other: other["quant_method"],
)
def test_other_methods_are_refused_by_name(other):
    with pytest.raises(ValueError, match=rf"quant_method='{other['quant_method']}' is not supported. Supported: .*awq"):
        ModelConfig.from_hf(TINY | {"quantization_config": other})


def test_modelopts_own_file_is_seen(tmp_path, pair):
    _, plain = pair
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(ValueError, match=r"hf_quant_config.json: quant_method='modelopt' is not supported. Supported:"):
        load_params(tmp_path, config_of(plain), mesh_of(1), "float32", progress=False)


def test_version_may_be_in_capitals():
    assert tiny("awq", quantization_config=QUANTIZATION["awq"] | {"version": "GEMM"}).quantization is not None


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({"head_dim": 96}, 1, "head_dim=96 is no multiple of 64"),
        ({"head_dim": 64, "num_key_value_heads": 1}, 1, r"num_key_value_heads \* head_dim=64 is no multiple of 128"),
        ({"hidden_size": 192}, 1, "hidden_size=192 is no multiple of 128"),
        ({"intermediate_size": 320}, 1, r"intermediate_size=320 is no multiple of 128"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_sizes_of_no_whole_groups(method, changes, tp, message):
    with pytest.raises(ValueError, match=message):
        abstract_model(tiny(method, **changes), "float32", mesh_of(tp))


def test_groups_of_two_heads_are_not_split():
    abstract_model(tiny("fp8", head_dim=64), "float32", mesh_of(2))
    with pytest.raises(ValueError, match=r"head_dim=64 is no multiple of 128: .* tensor_parallel_size=2"):
        abstract_model(tiny("awq", head_dim=64), "float32", mesh_of(2))


@pytest.mark.parametrize("method", METHODS)
def test_heads_of_64(tmp_path, method):
    """As Qwen2.5-0.5B has them: scales are shared by two heads. FP8's also with each KV head there twice."""
    quantised, plain = write_pair(tmp_path, method, head_dim=64)
    expected = logits_of(plain)
    for tp in (1, 2, 4) if method == "fp8" else (1,):
        np.testing.assert_allclose(logits_of(quantised, tp), expected, rtol=0, atol=1e-4)


def test_awq_groups_are_never_split():
    message = r"intermediate_size=384 is no multiple of 128 × tensor_parallel_size=2"
    with pytest.raises(ValueError, match=message):
        abstract_model(tiny("awq", intermediate_size=384), "float32", mesh_of(2))


@pytest.mark.parametrize("method", METHODS)
def test_the_option_must_be_the_checkpoints(method):
    other = METHODS[METHODS.index(method) - 1]
    assert tiny(method).with_quantization(None) == tiny(method).with_quantization(method) == tiny(method)
    with pytest.raises(ValueError, match=f"quantization='{other}', but the checkpoint is quantised by '{method}'"):
        tiny(method).with_quantization(other)
    if method != "fp8":
        with pytest.raises(
            ValueError, match=r"the checkpoint is not quantised.* only fp8 and int4 are made while loading"
        ):
            ModelConfig.from_hf(TINY).with_quantization(method)


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

    kinds = [found.removeprefix(name) for found in tensors if found.startswith(name)]
    assert {weight, scale} < {*kinds, "bias"} and len(kinds) == {"fp8": 2, "awq": 3, "gptq": 4}[quantised.name]
    for kind in kinds:
        with pytest.raises(ValueError, match=rf"tensor {name}{kind} \[.*\] is missing"):
            load(tensors | {name + kind: None})
        with pytest.raises(ValueError, match=rf"tensor {name}{kind} has shape .*, expected \["):
            load(tensors | {name + kind: tensors[name + kind][:-1]})
    with pytest.raises(ValueError, match=rf"tensor {name}{scale} has dtype (int8|I8), expected"):
        load(tensors | {name + scale: np.zeros(tensors[name + scale].shape, np.int8)})
    with pytest.raises(ValueError, match=rf"tensor {name}input_scale is none of Qwen3ForCausalLM's"):
        load(tensors | {name + "input_scale": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=rf"tensor {name}{weight} has dtype bfloat16, expected (float8_e4m3fn|int32)"):
        load(tensors | {name + weight: np.zeros(tensors[name + weight].shape, ml_dtypes.bfloat16)})
    embedding = "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=rf"tensor {embedding} has dtype int32, expected bfloat16"):
        load(tensors | {embedding: tensors[embedding].astype(np.int32)})


def test_groups_out_of_order_are_refused(tmp_path):
    """`desc_act` may be said to be false, but the checkpoint's `g_idx` decides."""
    quantised, _ = write_pair(tmp_path, "gptq")
    tensors = dict(open_folder(quantised))
    name = "model.layers.1.mlp.down_proj.g_idx"
    tensors[name] = tensors[name][::-1].copy()
    save_file({k: np.array(v) for k, v in tensors.items()}, quantised / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name}: its groups are not 128 inputs that follow each other"):
        load_params(quantised, config_of(quantised), mesh_of(1), "float32", progress=False)


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
    weight = numbers_of({name: jnp.asarray(x) for name, x in made[0].items()}, 1)
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

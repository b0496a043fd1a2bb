"""FP8 layers on one and several devices: blocks cut between devices, the kernel's path, what the leaves hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import sharding
from qjax.checkpoint.names import leaf_of
from qjax.checkpoint.safetensors import load_params, open_folder
from qjax.kernels.fp8_matmul.reference import dequantize as dequantize_fp8
from qjax.kernels.fp8_matmul.reference import fp8_product
from qjax.models import fp8
from qjax.models.fp8 import FP8Linear
from qjax.models.layers import Linear
from qjax.models.qwen3 import abstract_model, merge
from tests.models.stepper import mesh_of
from tests.quantization.checkpoints import write_pair
from tests.quantization.test_quantized import config_of, logits_of, tiny

KINDS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def cut_pair(tmp_path_factory):
    """384 = 2 x 192 = 4 x 96: the blocks between the devices are halves and quarters."""
    return write_pair(tmp_path_factory.mktemp("cut"), "fp8", intermediate_size=384)


@pytest.mark.parametrize(("tp", "block"), [(1, 128), (2, 64), (4, 32)])
def test_blocks_cut_between_devices(cut_pair, tp: int, block: int):
    quantised, plain = cut_pair
    config = config_of(quantised)
    modeldef, leaves = abstract_model(config, "float32", mesh_of(tp))
    shapes = {path: leaf.shape for path, leaf in zip(modeldef.paths, leaves, strict=True)}
    assert shapes["layers.0.mlp.down_proj.weight_scale_inv"] == (2, 384 // block)
    assert shapes["layers.0.mlp.gate_up_proj.weight_scale_inv"] == (2, 384 // block, 2)
    arrays = load_params(quantised, config, mesh_of(tp), "float32", progress=False)
    layer = merge(modeldef, arrays).layers[1].mlp
    tensors = open_folder(plain)
    names = {name: tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
    expected = {"gate_up_proj": np.stack([names["gate"], names["up"]]), "down_proj": names["down"]}
    for name, numbers in expected.items():
        module = getattr(layer, name)
        weight, scale = (np.asarray(x[...]) for x in (module.weight, module.weight_scale_inv))
        np.testing.assert_array_equal(np.asarray(dequantize_fp8(jnp.asarray(weight), scale, "float32")), numbers)
    np.testing.assert_allclose(logits_of(quantised, tp), logits_of(plain), rtol=0, atol=1e-4)


def test_blocks_cannot_be_cut_too_small():
    abstract_model(tiny("fp8", intermediate_size=640), "float32", mesh_of(4))
    with pytest.raises(ValueError, match=r"intermediate_size=896 .* tensor_parallel_size=8 no multiple of 32"):
        tiny("fp8", intermediate_size=896).quantization.check_sizes(
            8, head_dim=128, num_attention_heads=8, num_key_value_heads=8, hidden_size=256, intermediate_size=896
        )


@pytest.fixture(scope="module")
def small_heads(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("small"), "fp8", intermediate_size=384, head_dim=64)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("folders", ["cut_pair", "small_heads"])
def test_leaves_give_the_tensors_back(request, folders: str, tp: int):
    """What a checkpoint writer needs: `Leaf.write` is the inverse of reading, repeated heads and blocks included."""
    cut_pair = request.getfixturevalue(folders)
    config = config_of(cut_pair[0])
    tensors = open_folder(cut_pair[0])
    modeldef, _ = abstract_model(config, "float32", mesh_of(tp))
    K, _ = sharding.split_heads(config.num_attention_heads, config.num_key_value_heads, tp)
    arrays = load_params(cut_pair[0], config, mesh_of(tp), "float32", progress=False)
    for path, array in zip(modeldef.paths, arrays, strict=True):
        if path.startswith("layers.0.") and path.endswith((".weight", "_inv")) and "_proj" in path:
            rule = leaf_of(path, config, K, tp)
            for name, tensor in rule.write(np.asarray(array)).items():
                assert tensor.shape == rule.shapes[name] == tensors[name].shape
                np.testing.assert_array_equal(tensor.astype(np.float32), tensors[name].astype(np.float32))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("use_bias", [False, True])
def test_parts_of_the_kernel_are_summed(monkeypatch, tp: int, num_parts: int, use_bias: bool):
    """The kernel's arithmetic in place of the kernel, in parts as it gives them, on each device its own."""
    rng = np.random.default_rng(0)

    def in_parts(x, w, scale, *, implementation):
        total = fp8_product(x, w, scale)
        return total[None].astype(x.dtype) if num_parts == 1 else jnp.stack([total / num_parts] * num_parts)

    monkeypatch.setattr(fp8, "fp8_matmul", in_parts)
    for shape, axes, num_inputs in (
        ((256, 2, 384), ("embed", "gate_up", "mlp"), 1),
        ((2, 2, 128, 256), ("kv_heads", "heads_of_kv", "head_dim", "embed"), 3),
        ((384, 256), ("mlp", "embed"), 1),
    ):
        with jax.set_mesh(mesh_of(tp)):
            layer = FP8Linear(shape, axes, num_inputs=num_inputs, use_bias=use_bias, dtype=jnp.bfloat16, rngs=None)
            put = lambda x, *axes: jax.device_put(x, sharding.named_sharding(mesh_of(tp), *axes))
            w = rng.standard_normal(layer.weight.shape).astype(layer.weight.dtype)
            scale = rng.uniform(0.01, 0.02, layer.weight_scale_inv.shape).astype(np.float32)
            layer.weight[...], layer.weight_scale_inv[...] = put(w, *layer.axes), put(scale, *layer.axes)
            bias = np.zeros(shape[num_inputs:], np.float32)
            if use_bias:
                bias = rng.standard_normal(bias.shape).astype(np.float32)
                layer.bias[...] = put(bias.astype(jnp.bfloat16), *layer.out_axes)
            x = put(jnp.asarray(rng.standard_normal((5, *shape[:num_inputs])), jnp.bfloat16), "tokens", *layer.in_axes)
            called, parts = jax.jit(lambda x, layer=layer: (layer(x), layer.parts(x, None)))(x)
        numbers = np.asarray(dequantize_fp8(jnp.asarray(w), scale, "float32"), np.float64)
        exact = np.tensordot(np.asarray(x, np.float64), numbers, (range(1, 1 + num_inputs), range(-num_inputs, 0)))
        assert parts.shape[0] == (1 if use_bias or (tp > 1 and axes[0] != "embed") else num_parts)
        for found in (np.asarray(called, np.float64), np.asarray(parts, np.float64).sum(axis=0)):
            error = np.linalg.norm(found - exact - bias) / np.linalg.norm(exact)
            assert error < 0.03  # of rounding the activations to e4m3; a product with exact activations is below 0.005


def test_weight_only_layers_are_within_a_hundredth():
    """The path of CPUs and older GPUs, in bfloat16, against the dequantised kernel in a plain layer."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh_of(1)):
        layer = FP8Linear((512, 384), ("mlp", "embed"), dtype=jnp.bfloat16, rngs=None)
        plain = Linear((512, 384), ("mlp", "embed"), dtype=jnp.bfloat16, rngs=None)
        w = rng.standard_normal((384, 512)).astype(layer.weight.dtype)
        scale = rng.uniform(0.01, 0.02, (3, 4)).astype(np.float32)
        layer.weight[...], layer.weight_scale_inv[...] = jnp.asarray(w), jnp.asarray(scale)
        plain.kernel[...] = dequantize_fp8(jnp.asarray(w), scale, jnp.bfloat16).T
        x = jnp.asarray(rng.standard_normal((7, 512)), jnp.bfloat16)
        x = jax.device_put(x, sharding.named_sharding(mesh_of(1), "tokens", "mlp"))
        found, expected = (np.asarray(jax.jit(module)(x), np.float32) for module in (layer, plain))
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)

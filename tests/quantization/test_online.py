"""`--quantization fp8` and `int4` of a plain checkpoint: quantised while it is loaded, on each device its own part."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qjax import LLM, SamplingParams
from qjax.checkpoint.safetensors import load_params, open_folder
from qjax.kernels.fp8_matmul.reference import dequantize, quantize
from qjax.kernels.int4_matmul import dequantize as dequantize_int4
from qjax.kernels.int4_matmul import pack_scales, pack_weights, quantize_packed
from qjax.kernels.int4_matmul import quantize as quantize_int4
from qjax.models.qwen3 import abstract_model
from qjax.research import score_texts
from tests.models.stepper import mesh_of
from tests.quantization.checkpoints import CONFIG
from tests.quantization.test_quantized import config_of, logits_of
from tests.text.small_tokenizer import write_small_tokenizer
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Weights of about their size in a trained model; F = 384, which four devices cut inside of blocks."""
    return write_plain(tmp_path_factory.mktemp("plain"), intermediate_size=384)


@pytest.fixture(scope="module")
def whole_groups(tmp_path_factory):
    """F = 512: each of four devices has whole groups."""
    return write_plain(tmp_path_factory.mktemp("whole"))


def write_plain(folder, **changes):
    config = CONFIG | {"vocab_size": 640} | changes
    tensors = write_checkpoint(folder, dtype=np.float32, **config)
    tensors = {name: 0.4 * t if "_proj." in name else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    write_small_tokenizer(folder)
    return folder


def test_blocks_by_numpy():
    weight = np.random.default_rng(0).standard_normal((256, 384), np.float32)
    weight[:128, :128] = 0
    w, scale = quantize(jnp.asarray(weight), (2, 3))
    for i, j in np.ndindex(2, 3):
        block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        amax = np.abs(weight[block]).max()
        np.testing.assert_allclose(scale[i, j], max(amax, 1e-10) / 448, rtol=1e-6)
        # e4m3 has 3 bits behind the leading one, and 2^-9 is its smallest step.
        error = np.abs(np.asarray(dequantize(w, scale, "float32"))[block] - weight[block])
        assert (error <= np.maximum(np.abs(weight[block]) / 16, amax / 448 / 2**10) * 1.001).all()
    assert w.shape == weight.shape and w.dtype == jnp.float8_e4m3fn


def test_groups_by_numpy():
    """Also of one sign, of zeros and of numbers too small for a scale of float16."""
    weight = np.random.default_rng(0).standard_normal((384, 128), np.float32)
    weight[:128, 0], weight[:128, 1], weight[:128, 2] = 3 + weight[:128, 0] / 10, 0, 1e-6 * weight[:128, 2]
    q, scales, zeros = (np.asarray(x) for x in jax.jit(quantize_int4)(weight))
    for group, column in np.ndindex(3, 128):
        part = weight[128 * group : 128 * (group + 1), column]
        low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
        scale = max((high - low) / np.float32(15), np.float32(2**-17)).astype(ml_dtypes.bfloat16)
        assert scales[group, column] == scale == np.float16(scale)
        scale = np.float32(scale)
        zero = np.clip(np.round(-low / scale), 0, 15)
        np.testing.assert_array_equal(zeros[group, column], zero)
        found = (q[128 * group : 128 * (group + 1), column] - zero) * scale
        # half a step; at the ends a step, where the rounded scale reaches less far
        assert (np.abs(found - part) <= scale * np.where((part == low) | (part == high), 1.0, 0.6)).all()
    words, scales_zeros = jax.jit(quantize_packed)(weight)
    np.testing.assert_array_equal(words, pack_weights(q))
    np.testing.assert_array_equal(scales_zeros, pack_scales(scales, zeros))


def test_int4_leaves_are_the_groups_of_the_weights(whole_groups):
    """On one device and on four, where KV heads are there twice."""
    tensors = open_folder(whole_groups)
    config, names = config_of(whole_groups).with_quantization("int4"), ("words", "scales_zeros")
    for tp in (1, 4):
        modeldef, abstract = abstract_model(config, "float32", mesh_of(tp))
        leaves = load_params(whole_groups, config, mesh_of(tp), "float32", progress=False)
        assert [(x.shape, x.dtype) for x in leaves] == [(x.shape, x.dtype) for x in abstract]
        assert all(x.sharding == y.sharding for x, y in zip(leaves, abstract, strict=True))
        assert tp > 1 or sum(x.nbytes for x in leaves) == config.weights_bytes(4)
        by_path = {path: np.asarray(leaf) for path, leaf in zip(modeldef.paths, leaves, strict=True)}
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight = tensors[f"model.layers.1.{name}.weight"]
            expected = jax.jit(quantize_packed)(weight.T)
            for kind, array in zip(names, expected, strict=True):
                np.testing.assert_array_equal(by_path[f"layers.1.{name}.{kind}"].reshape(array.shape), array)
            assert np.linalg.norm(dequantize_int4(*expected, "float32") - weight) < 0.12 * np.linalg.norm(weight)


def test_int4_with_heads_of_64(tmp_path):
    folder = write_plain(tmp_path, head_dim=64)
    config = config_of(folder).with_quantization("int4")
    modeldef, _ = abstract_model(config, "float32", mesh_of(1))
    leaves = dict(zip(modeldef.paths, load_params(folder, config, mesh_of(1), "float32", progress=False), strict=True))
    expected = quantize_packed(open_folder(folder)["model.layers.1.self_attn.o_proj.weight"].T)
    np.testing.assert_array_equal(leaves["layers.1.self_attn.o_proj.words"][0, 0], expected[0])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_fp8_leaves_are_about_the_weights(plain, tp: int):
    """And take what the plan says (more bytes where KV heads are there twice)."""
    config = config_of(plain).with_quantization("fp8")
    modeldef, abstract = abstract_model(config, "bfloat16", mesh_of(tp))
    leaves = load_params(plain, config, mesh_of(tp), "bfloat16", progress=False)
    assert [(x.shape, x.dtype) for x in leaves] == [(x.shape, x.dtype) for x in abstract]
    assert tp > 1 or sum(x.nbytes for x in leaves) == config.weights_bytes(2)
    by_path = dict(zip(modeldef.paths, leaves, strict=True))
    down = {kind: by_path[f"layers.1.mlp.down_proj.{kind}"] for kind in ("weight", "weight_scale_inv")}
    number = np.asarray(dequantize(*(jnp.asarray(np.asarray(x)) for x in down.values()), "float32"))
    expected = open_folder(plain)["model.layers.1.mlp.down_proj.weight"]
    assert np.linalg.norm(number - expected) < 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize(("method", "limit"), [("fp8", 0.1), ("int4", 0.5)])
def test_logits_are_near_the_plain_models(plain, whole_groups, monkeypatch, method: str, limit: float, tp: int):
    folder = plain if method == "fp8" else whole_groups
    expected = logits_of(folder)
    made = config_of(folder).with_quantization(method)
    monkeypatch.setattr("tests.quantization.test_quantized.config_of", lambda folder: made)
    error = logits_of(folder, tp) - expected
    assert 1e-4 < np.linalg.norm(error) < limit * np.linalg.norm(expected)


@pytest.mark.parametrize("method", ["fp8", "int4"])
def test_answers_from_the_option(plain, method: str):
    options = {"kv_cache_memory_bytes": "16MiB", "max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "float32"}
    llm = LLM(str(plain), quantization=method, **options)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    answer = lambda: list(llm.generate([[7, 8, 9, 10]], greedy, use_tqdm=False)[0].outputs[0].token_ids)
    first = answer()
    assert len(first) == 8
    llm.sleep(2)
    llm.wake_up()
    assert answer() == first
    with pytest.raises(ValueError, match=rf"scoring: the model is quantised \({method}\)"):
        score_texts(llm, [[7, 8, 9]])


def test_a_model_that_cannot_be_quantised_is_named(tmp_path):
    write_checkpoint(tmp_path, dtype=np.float32, **(CONFIG | {"head_dim": 96}))
    with pytest.raises(ValueError, match="head_dim=96 is no multiple of 64"):
        abstract_model(config_of(tmp_path).with_quantization("fp8"), "float32", mesh_of(1))


def test_groups_of_int4_are_not_split(plain):
    with pytest.raises(ValueError, match=r"intermediate_size=384 is no multiple of 128 × tensor_parallel_size=2.*int4"):
        abstract_model(config_of(plain).with_quantization("int4"), "float32", mesh_of(2))

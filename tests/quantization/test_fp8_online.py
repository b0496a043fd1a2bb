"""`--quantization fp8` of a plain checkpoint: quantised while it is loaded, on each device its own part."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from qjax import LLM, SamplingParams
from qjax.checkpoint.safetensors import load_params, open_folder
from qjax.kernels.fp8_matmul.reference import dequantize, quantize
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
    folder = tmp_path_factory.mktemp("plain")
    config = CONFIG | {"intermediate_size": 384, "vocab_size": 640}
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


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_leaves_are_about_the_weights(plain, tp: int):
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
def test_logits_are_near_the_plain_models(plain, monkeypatch, tp: int):
    expected = logits_of(plain)
    made = config_of(plain).with_quantization("fp8")
    monkeypatch.setattr("tests.quantization.test_quantized.config_of", lambda folder: made)
    error = logits_of(plain, tp) - expected
    assert 1e-4 < np.linalg.norm(error) < 0.1 * np.linalg.norm(expected)


def test_answers_from_the_option(plain):
    options = {"kv_cache_memory_bytes": "16MiB", "max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "float32"}
    llm = LLM(str(plain), quantization="fp8", **options)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    answer = lambda: list(llm.generate([[7, 8, 9, 10]], greedy, use_tqdm=False)[0].outputs[0].token_ids)
    first = answer()
    assert len(first) == 8
    llm.sleep(2)
    llm.wake_up()
    assert answer() == first
    with pytest.raises(ValueError, match=r"scoring: the model is quantised \(fp8\)"):
        score_texts(llm, [[7, 8, 9]])


def test_a_model_that_cannot_be_quantised_is_named(tmp_path):
    write_checkpoint(tmp_path, dtype=np.float32, **(CONFIG | {"head_dim": 64}))
    with pytest.raises(ValueError, match="head_dim=64 is no multiple of 128"):
        abstract_model(config_of(tmp_path).with_quantization("fp8"), "float32", mesh_of(1))

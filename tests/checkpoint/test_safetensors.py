"""Loading: the right numbers in the right place, little memory, and a named reason for every broken folder."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax import sharding
from qjax.checkpoint import names, safetensors
from qjax.checkpoint.safetensors import dummy_params, load_params, save_params
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import abstract_model
from tests.tiny import MOE, TINY, write_checkpoint

ONE = sharding.make_mesh(1)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def config_of(folder) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))


def load(folder, mesh=ONE, dtype="bfloat16", **config):
    return load_params(folder, ModelConfig.from_hf(TINY | config), mesh, dtype, progress=False)


def by_path(folder, mesh=ONE, dtype="float32") -> dict[str, jax.Array]:
    modeldef, _ = abstract_model(config_of(folder), dtype, mesh)
    leaves = load_params(folder, config_of(folder), mesh, dtype, progress=False)
    return dict(zip(modeldef.paths, leaves, strict=True))


def test_fused_weights_hold_each_kv_head_with_its_queries(tmp_path):
    tensors = write_checkpoint(tmp_path, dtype=np.float32)
    leaves = by_path(tmp_path)
    attention = "layers.1.self_attn"
    x = np.random.default_rng(1).standard_normal((3, 64), np.float32)
    qkv = np.einsum("TD,DKGH->TKGH", x, leaves[f"{attention}.qkv_proj.kernel"])
    heads = {name: x @ tensors[f"model.{attention}.{name}_proj.weight"].T for name in "qkv"}
    np.testing.assert_allclose(qkv[:, :, :4].reshape(3, -1), heads["q"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(qkv[:, :, 4].reshape(3, -1), heads["k"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(qkv[:, :, 5].reshape(3, -1), heads["v"], rtol=1e-4, atol=1e-4)
    o_proj = np.asarray(leaves[f"{attention}.o_proj.kernel"]).reshape(-1, 64)
    np.testing.assert_array_equal(o_proj, tensors[f"model.{attention}.o_proj.weight"].T)
    gate_up = np.asarray(leaves["layers.1.mlp.gate_up_proj.kernel"])
    np.testing.assert_array_equal(gate_up[:, 0], tensors["model.layers.1.mlp.gate_proj.weight"].T)
    np.testing.assert_array_equal(gate_up[:, 1], tensors["model.layers.1.mlp.up_proj.weight"].T)


VARIANTS = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"architectures": ["Qwen2ForCausalLM"]},
    {"num_key_value_heads": 8},
    {"num_key_value_heads": 1},
    MOE,
]


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_what_is_loaded_and_saved_is_what_was_written(tmp_path, config, tp):
    tensors = write_checkpoint(tmp_path / "in", num_files=3, **config)
    mesh = sharding.make_mesh(tp)
    leaves = load(tmp_path / "in", mesh, **config)
    (tmp_path / "out").mkdir()
    save_params(leaves, config_of(tmp_path / "in"), tmp_path / "out", mesh)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved[name].view(np.uint16), tensor.view(np.uint16), err_msg=name)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_device_holds_its_part_of_each_split_weight(tmp_path, tp):
    write_checkpoint(tmp_path)
    whole, split = by_path(tmp_path), by_path(tmp_path, sharding.make_mesh(tp))
    for path, leaf in split.items():
        is_norm = "norm" in path
        assert leaf.addressable_shards[0].data.size == leaf.size // (1 if is_norm else tp), path
        if tp == 2:  # as many KV heads: the same leaves
            np.testing.assert_array_equal(leaf, whole[path], err_msg=path)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_rounded_to_the_asked_dtype(tmp_path, stored, dtype):
    tensors = write_checkpoint(tmp_path, dtype=stored)
    leaves = by_path(tmp_path, dtype=dtype)
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(dtype)}
    np.testing.assert_array_equal(
        leaves["embed_tokens.weight"], tensors["model.embed_tokens.weight"].astype(np.dtype(dtype))
    )


def test_tensors_of_mixed_dtypes_in_one_fused_weight(tmp_path):
    tensors = write_checkpoint(tmp_path, dtype=np.float32)
    tensors[Q_PROJ] = tensors[Q_PROJ].astype(ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    kernel = np.asarray(by_path(tmp_path)["layers.1.self_attn.qkv_proj.kernel"])
    q = kernel[:, :, :-2].reshape(64, -1).T
    np.testing.assert_array_equal(q, tensors[Q_PROJ].astype(np.float32))


def test_extra_tensors_that_are_known_to_be_unused_are_skipped(tmp_path):
    tensors = write_checkpoint(tmp_path, tie_word_embeddings=True)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    save_file(tensors | extra, tmp_path / "model.safetensors")
    assert len(load(tmp_path, tie_word_embeddings=True)) == 18


def test_the_host_never_holds_more_than_a_few_parts(tmp_path, monkeypatch):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 32}
    tensors = write_checkpoint(tmp_path, num_files=2, **shape)
    model_bytes = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    largest = 0

    def place(shape, where, read):  # as a GPU does, whose arrays do not lie in the host's memory
        nonlocal largest
        for index in where.addressable_devices_indices_map(shape).values():
            largest = max(largest, read(index).nbytes)
        return jnp.zeros(())

    monkeypatch.setattr(jax, "make_array_from_callback", place)
    tracemalloc.start()
    try:
        load(tmp_path, **shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest == 2 * 256 * 1024 * 2  # gate_up_proj of one layer, in bfloat16
    assert peak < (safetensors.NUM_READERS + 2) * largest + 6e6 < model_bytes / 2  # 6 MB: tracing the model


@pytest.mark.parametrize("tp", [1, 4])
def test_each_device_reads_only_its_part_of_every_expert(tmp_path, tp, monkeypatch):
    tensors = write_checkpoint(tmp_path, **MOE)
    read = dict.fromkeys(tensors, 0)  # bytes
    transpose_into = names.transpose_into

    def counted(out, matrix):
        name = next(name for name, tensor in opened.items() if np.shares_memory(tensor, matrix))
        read[name] += matrix.nbytes
        transpose_into(out, matrix)

    opened = safetensors.open_folder(tmp_path)
    monkeypatch.setattr(safetensors, "open_folder", lambda folder: opened)
    monkeypatch.setattr(names, "transpose_into", counted)
    leaves = by_path(tmp_path, sharding.make_mesh(tp), "bfloat16")
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    assert len(experts) == 2 * 8 * 3 and all(read[name] == tensor.nbytes for name, tensor in experts.items())
    gate_up, down = (leaves[f"layers.1.mlp.experts.{name}_proj.kernel"] for name in ("gate_up", "down"))
    parts = [shard.data for shard in gate_up.addressable_shards]
    assert {part.shape for part in parts} == {(8, 64, 2, 32 // tp)}
    whole, owner = np.concatenate(parts, axis=3), "model.layers.1.mlp.experts.5"
    np.testing.assert_array_equal(whole[5, :, 0], tensors[f"{owner}.gate_proj.weight"].T)
    np.testing.assert_array_equal(whole[5, :, 1], tensors[f"{owner}.up_proj.weight"].T)
    np.testing.assert_array_equal(np.asarray(down)[5], tensors[f"{owner}.down_proj.weight"].T)


def test_a_missing_expert_is_named(tmp_path):
    tensors = write_checkpoint(tmp_path, **MOE)
    del tensors["model.layers.1.mlp.experts.6.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor model\.layers\.1\.mlp\.experts\.6\.up_proj\.weight .* is missing"):
        load(tmp_path, **MOE)


def broken(tmp_path, change) -> str:
    """The message with which a folder of two files is refused after `change(folder, files)`."""
    write_checkpoint(tmp_path, num_files=2)
    change(tmp_path, sorted(tmp_path.glob("*.safetensors")))
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    return str(error.value)


def rewrite(file, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_missing_file_is_named(tmp_path):
    message = broken(tmp_path, lambda folder, files: files[1].unlink())
    assert "model-00002-of-00002.safetensors is missing" in message


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    message = broken(tmp_path, lambda folder, files: files[0].write_bytes(files[0].read_bytes()[:keep]))
    assert "model-00001-of-00002.safetensors: truncated" in message


def test_a_header_that_is_none_is_named(tmp_path):
    message = broken(tmp_path, lambda folder, files: files[0].write_bytes(b"\x04" + bytes(7) + b"oops" + bytes(90)))
    assert "model-00001-of-00002.safetensors: the header is not JSON" in message
    message = broken(tmp_path, lambda folder, files: files[0].write_bytes(b"<!DOCTYPE html><html>" * 9))
    assert "model-00001-of-00002.safetensors" in message


@pytest.mark.parametrize(
    "header", [b"[]", b'{"x": 1}', b'{"x": {"dtype": "F32"}}', b'{"x": {"dtype":"F32","shape":[1],"data_offsets":[0]}}']
)
def test_a_header_of_another_kind_is_named(tmp_path, header):
    data = len(header).to_bytes(8, "little") + header
    message = broken(tmp_path, lambda folder, files: files[0].write_bytes(data))
    assert "model-00001-of-00002.safetensors: the header is not that of a safetensors file" in message


@pytest.mark.parametrize(
    "wrong",
    [
        {"data_offsets": [-64, 0]},
        {"data_offsets": [64, 128]},
        {"data_offsets": [0.0, 64.0]},
        {"data_offsets": [0, 2**70]},
        {"shape": [-4, -4]},
        {"shape": "ab"},
        {"shape": [16.0]},
        {"dtype": ["F32"]},
        {"dtype": "F33"},
    ],
    ids=str,
)
def test_offsets_and_shapes_that_cannot_be_are_named(tmp_path, wrong):
    """`x` is wrong; `y`, where there is one, has the same bytes as it should have."""
    good = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    for entries in ({"x": good | wrong}, {"y": good, "x": good | wrong}, {"y": good, "x": good}):
        header = json.dumps(entries).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        with pytest.raises(ValueError, match=re.escape(f"{file}: ")):
            safetensors.open_folder(tmp_path)


def test_any_flipped_bit_of_a_header_is_named_or_only_a_name(tmp_path):
    """In the data nothing can be told from other weights: the format has no checksum."""
    header = b'{"weight": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}}'
    file, whole = tmp_path / "model.safetensors", len(header).to_bytes(8, "little") + header + bytes(64)
    num_read = 0
    for i in range(8 * (8 + len(header))):
        data = bytearray(whole)
        data[i // 8] ^= 1 << i % 8
        file.write_bytes(data)
        try:
            [tensor] = safetensors.open_folder(tmp_path).values()
        except ValueError as error:
            assert str(error).startswith(f"{file}: "), error
        else:
            assert tensor.shape == (2, 8) and tensor.dtype == np.float32
            num_read += 1
    assert num_read < 8 * len("weight") + 8


def test_a_file_that_is_cut_while_it_is_read_ends_the_process_with_a_word(tmp_path):
    """Its pages are gone, so the system ends the process (SIGBUS): `qjax` says at least what it was doing."""
    write_checkpoint(tmp_path)
    code = f"""
import os
from qjax import cli
from qjax.checkpoint.safetensors import open_folder
cli.main(["--version"])
tensors = open_folder({str(tmp_path)!r})
os.truncate({str(tmp_path / "model.safetensors")!r}, 4096)
def read_weights(): return sum(tensor.view("u1").sum() for tensor in tensors.values())
read_weights()
"""
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environ)
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr and "in read_weights" in done.stderr


def test_a_file_that_is_too_long_is_named(tmp_path):
    message = broken(tmp_path, lambda folder, files: files[0].write_bytes(files[0].read_bytes() + b"more"))
    assert "model-00001-of-00002.safetensors: damaged" in message


def test_a_failure_while_loading_ends_it(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, num_hidden_layers=12)
    calls = []

    def full(*args):
        calls.append(args)
        time.sleep(0.01)
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(jax, "make_array_from_callback", full)
    monkeypatch.setattr(safetensors, "NUM_READERS", 1)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        load(tmp_path, num_hidden_layers=12)
    assert len(calls) < 50  # of 99 leaves


def test_a_missing_tensor_is_named(tmp_path):
    change = lambda folder, files: rewrite(files[1], lambda tensors: tensors.pop(Q_PROJ))
    assert f"tensor {Q_PROJ} is missing" in broken(tmp_path, change)
    (tmp_path / "model.safetensors.index.json").unlink()
    write_checkpoint(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(ValueError, match=re.escape(f"tensor {Q_PROJ} [128, 64] is missing")):
        load(tmp_path)


def test_an_extra_tensor_is_named(tmp_path):
    add = lambda tensors: tensors.update({"model.layers.9.mlp.gate_proj.weight": np.ones(3, np.float32)})
    message = broken(tmp_path, lambda folder, files: rewrite(files[0], add))
    assert "model.layers.9.mlp.gate_proj.weight" in message and "Qwen3ForCausalLM" in message


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    change = lambda tensors: tensors.update({Q_PROJ: np.ones((64, 64), np.float32)})
    message = broken(tmp_path, lambda folder, files: rewrite(files[1], change))
    assert f"tensor {Q_PROJ} has shape [64, 64], expected [128, 64]" in message


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    change = lambda tensors: tensors.update({Q_PROJ: np.ones((128, 64), np.int8)})
    message = broken(tmp_path, lambda folder, files: rewrite(files[1], change))
    assert f"tensor {Q_PROJ} has dtype I8, expected one of BF16, F16, F32" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt", "model-q4.gguf"])
def test_a_folder_without_safetensors_says_what_it_has_instead(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"neither model\.safetensors nor .* is there\. It has {name}"):
        load(tmp_path)


def test_nothing_reaches_a_device_before_all_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *args: pytest.fail("device memory was filled"))
    # The last tensor of the last file.
    broken(tmp_path, lambda folder, files: rewrite(files[1], lambda tensors: tensors.popitem()))


def test_dummy_weights_are_random_seeded_and_the_same_on_any_mesh():
    config = ModelConfig.from_hf(TINY | {"attention_bias": True, "tie_word_embeddings": True})

    def make(tp, seed):
        modeldef, leaves = abstract_model(config, "float32", sharding.make_mesh(tp))
        made = dummy_params(leaves, modeldef, seed)
        assert [(x.shape, x.dtype, x.sharding) for x in made] == [(x.shape, x.dtype, x.sharding) for x in leaves]
        return dict(zip(modeldef.paths, made, strict=True))

    one, two, other = make(1, 0), make(2, 0), make(1, 1)
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[path], err_msg=path)
        if "norm" in path or path.endswith("bias"):
            assert np.unique(leaf).tolist() == [0.0 if path.endswith("bias") else 1.0]
        else:
            assert np.std(leaf) == pytest.approx(0.02, rel=0.05)
            assert not np.array_equal(leaf, other[path])
    kernels = [np.asarray(leaf) for path, leaf in one.items() if path.endswith("qkv_proj.kernel")]
    assert not np.array_equal(*kernels)

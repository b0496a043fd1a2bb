"""`qjax convert`: the folder that it writes, that it is what loading makes, and what it refuses."""

import errno
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from qjax import LLM, SamplingParams
from qjax.checkpoint import convert as converting
from qjax.checkpoint.convert import convert
from qjax.checkpoint.safetensors import INDEX_NAME, load_params, open_folder
from qjax.cli import main
from qjax.models.qwen3 import abstract_model
from qjax.quantization.int4 import pack_awq
from tests.models.stepper import mesh_of
from tests.quantization.checkpoints import CONFIG, QUANTIZATION, pack, write_pair
from tests.quantization.test_quantized import config_of
from tests.text.small_tokenizer import write_small_tokenizer
from tests.tiny import write_checkpoint

PROJECTIONS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "plain"
    tensors = write_checkpoint(folder, dtype=np.float32, **(CONFIG | {"vocab_size": 640}))
    tensors = {name: (0.4 * t if "_proj." in name else t).astype(ml_dtypes.bfloat16) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    write_small_tokenizer(folder)
    (folder / "LICENSE").write_text("a licence")
    (folder / "notes.bin").write_text("not copied")
    return folder


@pytest.fixture(scope="module", params=["fp8", "int4"])
def converted(request, plain, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / request.param
    convert(plain, output, request.param, shard_bytes=500_000, progress=False)
    return output


def test_the_folder(plain, converted):
    own = json.loads((converted / "config.json").read_text())
    quantization = own.pop("quantization_config")
    assert own == json.loads((plain / "config.json").read_text())
    published = QUANTIZATION["fp8" if converted.name == "fp8" else "awq"]
    assert quantization == published | {"modules_to_not_convert": ["lm_head"]}
    names = {path.name for path in converted.iterdir()}
    assert {path.name for path in plain.iterdir()} - names == {"notes.bin", "model.safetensors"}
    index = json.loads((converted / INDEX_NAME).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert {name for name in names if name.endswith(".safetensors")} == set(shards)
    for shard in shards:  # by the format's own library
        with safe_open(converted / shard, "np") as file:
            assert set(file.keys()) == {name for name, where in index["weight_map"].items() if where == shard}
    tensors = open_folder(converted)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_names_shapes_and_types(plain, converted):
    """As Qwen3's FP8 and AWQ checkpoints have them; whatever is no projection is copied bit by bit."""
    tensors, originals = open_folder(converted), open_folder(plain)
    for layer, module in [(i, m) for i in range(2) for m in PROJECTIONS]:
        name = f"model.layers.{layer}.{module}"
        out, inner = originals.pop(f"{name}.weight").shape
        if converted.name == "fp8":
            expected = {
                "weight": ("float8_e4m3fn", (out, inner)),
                "weight_scale_inv": ("f4", (out // 128, inner // 128)),
            }
        else:
            expected = {"qweight": ("i4", (inner, out // 8)), "qzeros": ("i4", (inner // 128, out // 8))}
            expected["scales"] = ("f2", (inner // 128, out))
        for kind, (dtype, shape) in expected.items():
            tensor = tensors.pop(f"{name}.{kind}")
            assert (tensor.dtype, tensor.shape) == (np.dtype(dtype), shape)
    assert tensors.keys() == originals.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == originals[name].dtype and tensor.tobytes() == originals[name].tobytes()


def test_it_loads_as_what_loading_makes(plain, converted):
    """Bit by bit: the same weights and scales as `--quantization` gives."""
    leaves = []
    for folder, method in ((converted, None), (plain, converted.name)):
        config = config_of(folder).with_quantization(method)
        leaves.append(load_params(folder, config, mesh_of(1), "bfloat16", progress=False))
    modeldef, _ = abstract_model(config, "bfloat16", mesh_of(1))
    for path, found, expected in zip(modeldef.paths, *leaves, strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes(), path


def test_it_answers(converted):
    llm = LLM(str(converted), kv_cache_memory_bytes="16MiB", max_num_seqs=2, max_num_batched_tokens=64, dtype="float32")
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    assert len(llm.generate([[7, 8, 9, 10]], params, use_tqdm=False)[0].outputs[0].token_ids) == 4


def test_words_are_packed_as_autoawq_does():
    q = np.random.default_rng(0).integers(0, 16, (16, 64), np.uint8)
    np.testing.assert_array_equal(pack_awq(q), pack(q))


def test_what_is_refused(plain, tmp_path):
    with pytest.raises(ValueError, match=r"out exists already: remove it, or name another folder"):
        (tmp_path / "out").mkdir()
        convert(plain, tmp_path / "out", "fp8")
    quantised, _ = write_pair(tmp_path, "fp8")
    with pytest.raises(ValueError, match=r"is quantised already \(fp8\): convert its plain checkpoint"):
        convert(quantised, tmp_path / "new", "int4")
    other = tmp_path / "other"
    write_checkpoint(other, dtype=np.float32, **(CONFIG | {"intermediate_size": 320}))
    with pytest.raises(ValueError, match="intermediate_size=320 is no multiple of 128"):
        convert(other, tmp_path / "new", "int4")
    part = tmp_path / "part"
    shutil.copytree(plain, part)
    tensors = {n: np.array(t) for n, t in open_folder(plain).items() if n != "model.layers.1.mlp.up_proj.weight"}
    save_file(tensors, part / "model.safetensors")
    with pytest.raises(ValueError, match="has 13 weights of projections, expected 14"):
        convert(part, tmp_path / "new", "fp8")
    assert not list(tmp_path.glob("new*"))


def test_a_full_disk_leaves_nothing(plain, tmp_path, monkeypatch):
    output = tmp_path / "deep" / "out"

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(converting.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
        with pytest.raises(
            ValueError, match=r"The disk is full while writing .*out: .* GB are needed, 0.0 GB are free"
        ):
            convert(plain, output, "fp8", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(converting, "_header", fail)
        with pytest.raises(ValueError, match=r"The disk is full while writing .*No space left on device"):
            convert(plain, output, "fp8", progress=False)
    assert not list(output.parent.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written"):
        convert(plain, tmp_path / "file" / "out", "fp8", progress=False)


def test_the_command(plain, tmp_path, capsys):
    assert main(["convert", str(plain), str(tmp_path / "out"), "-q", "int4"]) == 0
    assert f"Saved: {tmp_path / 'out'} (0.00 GiB). Try it: qjax chat" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()  # small: one file, no index
    assert main(["convert", str(plain), str(tmp_path / "out"), "--quantization", "fp8"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(plain), "--quantization", "fp8"]) == 2
    assert "no output given" in capsys.readouterr().err
    assert main(["convert", str(plain), str(tmp_path / "new"), "--quantization", "awq"]) == 2
    assert "choose from" in capsys.readouterr().err

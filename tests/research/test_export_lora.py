"""Exported folders and adapters: read back they are the same model; PEFT's names and shapes."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from qjax.checkpoint.safetensors import load_params, open_folder
from qjax.research import LoRAConfig
from qjax.research.export import _assign
from qjax.research.lora import load_adapter, make_adapter_def
from qjax.research.scoring import score_texts
from tests.research.conftest import losses

TEXTS = [[3, 5, 7, 9, 11, 13], [150, 1, 2, 3], list(range(40))]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_an_exported_folder_is_the_trained_model(make_trainer, tmp_path, num_shards):
    trainer = make_trainer(num_steps=2, num_shards=num_shards, output=str(tmp_path))
    trainer.train()
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(names) == num_shards and (num_shards == 1 or f"model-00001-of-0000{num_shards}.safetensors" in names)
    leaves = load_params(tmp_path, trainer.model_config, trainer.mesh, jnp.float32, progress=False)
    for path, leaf, trained in zip(trainer.modeldef.paths, leaves, trainer.params, strict=True):
        rounded = np.asarray(trained).astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(leaf, rounded), path
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["Qwen3ForCausalLM"]
    assert (tmp_path / "generation_config.json").is_file()
    assert oct((tmp_path / sorted(names)[0]).stat().st_mode) == oct((tmp_path / "config.json").stat().st_mode)


def test_transformers_reads_the_exported_files(make_trainer, tmp_path):
    from transformers import AutoConfig

    make_trainer(num_steps=1, output=str(tmp_path), num_shards=2).train()
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "qwen3" and config.hidden_size == 32
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = {name: t for path in tmp_path.glob("*.safetensors") for name, t in load_file(path).items()}
    assert set(tensors) == set(index["weight_map"])
    assert sum(t.nbytes for t in tensors.values()) == index["metadata"]["total_size"]


def test_shards_are_about_equal_and_none_is_empty():
    sizes = {str(i): size for i, size in enumerate([50, 10, 10, 10, 20, 20, 30])}
    shards = _assign(sizes, 3)
    assert [sum(sizes[n] for n, s in shards.items() if s == i) for i in range(3)] == [50, 50, 50]
    assert set(_assign({"a": 100, "b": 1, "c": 1}, 3).values()) == {0, 1, 2}
    with pytest.raises(ValueError, match="num_shards=4, but the model has 3 tensors"):
        _assign({"a": 1, "b": 1, "c": 1}, 4)


def test_the_models_own_folder_is_not_overwritten(make_trainer, micro_checkpoint):
    with pytest.raises(ValueError, match="is the model's own folder"):
        make_trainer(num_steps=1).export(micro_checkpoint)


def test_an_adapter_learns_and_equals_its_merged_weights(make_trainer, tmp_path):
    trainer = make_trainer(lora={"rank": 4, "alpha": 16}, num_steps=12, learning_rate=1e-2, output=str(tmp_path))
    before = [np.asarray(leaf) for leaf in trainer.frozen]
    trainer.train()
    curve = losses(trainer)
    assert np.mean(curve[-3:]) < curve[0] - 0.2
    assert all(np.array_equal(a, b) for a, b in zip(before, trainer.frozen, strict=True))

    # By the files alone: W + alpha / rank * B A in float64, tensor by tensor, and read as an ordinary model.
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    merged = open_folder(tmp_path)
    base = open_folder(trainer.folder)
    changed = set()
    for name, tensor in base.items():
        key = "base_model.model." + name.removesuffix(".weight")
        expected = tensor.astype(np.float64)
        if f"{key}.lora_A.weight" in adapter:
            a, b = (adapter[f"{key}.lora_{kind}.weight"].astype(np.float64) for kind in "AB")
            expected = expected + described["lora_alpha"] / described["r"] * b @ a
            changed.add(name.split(".")[-2])
        np.testing.assert_allclose(merged[name].astype(np.float64), expected, rtol=2**-8, atol=1e-6)
    assert changed == set(described["target_modules"]) and len(changed) == 7
    assert len(adapter) == 2 * 7

    scored = score_texts(trainer, TEXTS)
    again = make_trainer(model=str(tmp_path), num_steps=1)  # rounded to bfloat16
    for one, two in zip(scored, score_texts(again, TEXTS), strict=True):
        np.testing.assert_allclose(one.logprobs, two.logprobs, rtol=0, atol=0.05)


def test_an_adapter_is_the_same_where_each_kv_head_is_there_twice(make_trainer, tmp_path):
    options = {"lora": {"rank": 2, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}, "num_steps": 4}
    one = make_trainer(**options)
    one.save_adapter(tmp_path)
    one.train()
    split = make_trainer(**options, tensor_parallel_size=4)
    resharded = load_adapter(tmp_path, split.adapterdef, split.mesh)
    split.state = dataclasses.replace(split.state, params=resharded)
    split.train()
    np.testing.assert_allclose(losses(split), losses(one), rtol=0, atol=2e-4)


def test_an_adapter_goes_on_from_its_folder(make_trainer, tmp_path):
    first = make_trainer(lora={"rank": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}, num_steps=3)
    first.train()
    first.save_adapter(tmp_path)
    second = make_trainer(adapter=str(tmp_path))
    assert second.adapterdef.config == LoRAConfig(rank=4, alpha=8, target_modules=("q_proj", "down_proj"))
    for a, b in zip(first.state.params, second.state.params, strict=True):
        assert np.array_equal(a, b)
    assert second.step == 0 and len(jax.tree.leaves(second.state.params)) == 4


def test_an_adapter_has_pefts_names_and_shapes(make_trainer, tmp_path):
    trainer = make_trainer(lora={"rank": 3}, num_steps=1)
    trainer.save_adapter(tmp_path)
    shapes = {name: t.shape for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    prefix = "base_model.model.model.layers.0"
    assert shapes[f"{prefix}.self_attn.q_proj.lora_A.weight"] == (3, 32)
    assert shapes[f"{prefix}.self_attn.q_proj.lora_B.weight"] == (64, 3)
    assert shapes[f"{prefix}.self_attn.k_proj.lora_B.weight"] == (32, 3)
    assert shapes[f"{prefix}.self_attn.o_proj.lora_A.weight"] == (3, 64)
    assert shapes[f"{prefix}.mlp.gate_proj.lora_B.weight"] == (48, 3)
    assert shapes[f"{prefix}.mlp.down_proj.lora_A.weight"] == (3, 48)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["peft_type"] == "LORA" and described["task_type"] == "CAUSAL_LM" and described["r"] == 3
    bound = 1 / math.sqrt(32)
    first = load_file(tmp_path / "adapter_model.safetensors")[f"{prefix}.self_attn.q_proj.lora_A.weight"]
    assert 0.5 * bound < np.abs(first).max() <= bound


def test_adapters_that_qjax_cannot_hold_are_refused(make_trainer, tmp_path):
    trainer = make_trainer(lora={"rank": 2}, num_steps=1)
    trainer.save_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    good = json.loads(file.read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"target_modules": ["embed_tokens"]}, "target_modules must be some of"),
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            make_trainer(adapter=str(tmp_path))
    file.write_text(json.dumps(good))
    smaller = make_adapter_def(
        LoRAConfig(rank=2, target_modules=("q_proj",)), trainer.model_config, trainer.modeldef, trainer.mesh
    )
    with pytest.raises(ValueError, match="is of no target module"):
        load_adapter(tmp_path, smaller, trainer.mesh)
    with pytest.raises(ValueError, match="there is no adapter to save"):
        make_trainer(num_steps=1).save_adapter(tmp_path)

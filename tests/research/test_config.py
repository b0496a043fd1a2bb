"""Options of a run: every wrong one is named; a file and the command line give the same."""

import json

import pytest

from qjax import cli
from qjax.research import Corpus, LoRAConfig, TrainConfig, Trainer, read_train_config
from tests.research.conftest import counting_corpus


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "accumulation_steps": 4}, "batch_size=6 must be a multiple"),
        ({"seq_len": 100, "num_loss_chunks": 3}, "num_loss_chunks=3 must divide seq_len=100"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"beta2": 1.5}, "beta2 must be between 0 and 1"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"schedule": "sine"}, "schedule must be one of cosine, linear, wsd, constant"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"save_every": 5}, "save_every needs output"),
        ({"resume": True}, "resume needs output"),
        ({"tensorboard": True}, "tensorboard needs output"),
        ({"seq_len": "many"}, "seq_len must be of type int"),
        ({"lora": {"r": 3}}, "lora: unknown key 'r'; it has alpha, rank, target_modules"),
        ({"lora": {"rank": 0}}, "lora: rank must be at least 1"),
        ({"lora": {"target_modules": ["lm_head"]}}, r"lora: target_modules must be some of .*, got \['lm_head'\]"),
        ({"lora": {}, "from_scratch": True}, "does not go with from_scratch"),
        ({"adapter": "x", "lora": {}}, "adapter brings its own lora"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_files_of_options(tmp_path):
    toml, other = tmp_path / "run.toml", tmp_path / "run.json"
    toml.write_text('model = "m"\nlearning_rate = 1e-3\n[lora]\nrank = 8\n')
    other.write_text(json.dumps({"model": "m", "learning_rate": 1e-3, "lora": {"rank": 8}}))
    config = read_train_config(toml)
    assert config == read_train_config(other) and config.lora_config == LoRAConfig(rank=8)
    assert read_train_config(toml, learning_rate=1.0).learning_rate == 1.0
    toml.write_text("learning_rat = 1e-3")
    with pytest.raises(ValueError, match=r"run\.toml: there is no option 'learning_rat': did you mean learning_rate"):
        read_train_config(toml)
    toml.write_text("model = ")
    with pytest.raises(ValueError, match=r"run\.toml: "):
        read_train_config(toml)
    other.write_text("[]")
    with pytest.raises(ValueError, match="expected an object of options"):
        read_train_config(other)
    with pytest.raises(ValueError, match="No such file"):
        read_train_config(tmp_path / "none.toml")


def test_the_command_trains_and_says_what_is_wrong(micro_checkpoint, tmp_path, capsys):
    counting_corpus(60).save(tmp_path / "data")
    file = tmp_path / "run.toml"
    file.write_text(f'model = "{micro_checkpoint}"\ndata = "{tmp_path / "data"}"\nseq_len = 64\nbatch_size = 4\n')
    output = tmp_path / "out"
    assert cli.main(["train", str(file), "--num-steps", "2", "--output", str(output)]) == 0
    assert f"Saved: {output}" in capsys.readouterr().out
    assert (output / "model.safetensors").is_file() and (output / "train_log.jsonl").is_file()
    for arguments, message in (
        ([str(file)], "no output given"),
        ([str(file), "--output", str(output), "--batch-size", "5000"], "less than batch_size=5000"),
        (["--data", "x", "--output", str(output)], "model: no model given"),
        (["--model", str(micro_checkpoint), "--output", str(output)], "data: no training data given"),
        ([str(file), "--learning-rat", "1"], "did you mean --learning-rate?"),
    ):
        assert cli.main(["train", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_tensorboard_without_its_package_names_the_extra(micro_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    options = {"model": str(micro_checkpoint), "output": str(tmp_path), "tensorboard": True, "num_steps": 1}
    trainer = Trainer(TrainConfig(**options, seq_len=64, batch_size=4), corpus=counting_corpus(60))
    with pytest.raises(ValueError, match=r"pip install 'qjax\[tensorboard\]'"):
        trainer.train()
    assert isinstance(trainer.loader.corpus, Corpus)

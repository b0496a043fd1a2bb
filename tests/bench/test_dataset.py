"""Prompts of benchmarks: their lengths are exact, and a seed gives the same ones."""

import json

import pytest

from qjax.bench.config import DatasetConfig, ThroughputConfig
from qjax.bench.dataset import load_tokenizer, make_samples


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin")


def test_random_prompts_have_their_lengths(tokenizer):
    config = DatasetConfig(num_prompts=50, input_len=40, output_len=20, random_range_ratio=0.5, random_prefix_len=7)
    samples = make_samples(config, tokenizer, 3)
    assert [len(tokenizer.encode(s.prompt)) for s in samples] == [s.prompt_len for s in samples]
    inputs, outputs = {s.prompt_len - 7 for s in samples}, {s.output_len for s in samples}
    assert 20 <= min(inputs) < 30 and 50 < max(inputs) <= 60
    assert 10 <= min(outputs) < 15 and 25 < max(outputs) <= 30
    prefix = tokenizer.encode(samples[0].prompt)[:7]
    assert all(tokenizer.encode(s.prompt)[:7] == prefix for s in samples)
    assert len({s.prompt for s in samples}) == 50
    assert make_samples(config, tokenizer, 3) == samples != make_samples(config, tokenizer, 4)


def test_all_alike_without_a_range(tokenizer):
    samples = make_samples(DatasetConfig(num_prompts=3, random_input_len=5, random_output_len=2), tokenizer, 0)
    assert {(s.prompt_len, s.output_len) for s in samples} == {(5, 2)}


def test_sharegpt(tokenizer, tmp_path):
    def conversation(question, answer):
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    path = tmp_path / "chats.json"
    good = [conversation("What is the capital of France?", f"It is Paris, {i} times.") for i in range(3)]
    path.write_text(json.dumps([*good, conversation("Hi", "No"), {"conversations": []}]))
    config = DatasetConfig(dataset_name="sharegpt", dataset_path=str(path), num_prompts=5)
    samples = make_samples(config, tokenizer, 0)
    assert len(samples) == 5 and samples[3:] == samples[:2], "too few are asked again"
    assert {s.prompt for s in samples} == {"What is the capital of France?"}
    assert samples[0].output_len == len(tokenizer.encode("It is Paris, 1 times."))
    fixed = make_samples(
        DatasetConfig(dataset_name="sharegpt", dataset_path=str(path), num_prompts=2, output_len=9), tokenizer, 0
    )
    assert {s.output_len for s in fixed} == {9}
    path.write_text('[{"text": 1}]')
    with pytest.raises(ValueError, match="is not of the form"):
        make_samples(config, tokenizer, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be at least 1"),
        ({"random_range_ratio": 1.0}, r"random_range_ratio must be in \[0, 1\)"),
        ({"dataset_path": "x"}, "dataset_name random takes no dataset_path"),
        ({"dataset_name": "sharegpt"}, "dataset_name sharegpt needs a dataset_path"),
        ({"dataset_name": "sonnet"}, "dataset_name must be one of random, sharegpt, got 'sonnet'"),
        ({"dataset_name": "sharegpt", "dataset_path": "x", "input_len": 3}, "input_len is for random prompts"),
        ({"n": 0}, "n must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ThroughputConfig(**options)

"""What a benchmark asks: random prompts of exact lengths, or the first turns of real conversations."""

import itertools
import json
import random
import re
from dataclasses import dataclass

import numpy as np

from qjax.bench.config import DatasetConfig
from qjax.checkpoint import hub
from qjax.text.tokenizer import Tokenizer

_WORD = re.compile(rb" [A-Za-z]+")


@dataclass(frozen=True)
class Sample:
    prompt: str
    prompt_len: int
    output_len: int


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a folder, of a name on the hub, or of the built-in model.

    Raises:
      ValueError: there is none.
    """
    try:
        folder = hub.resolve(name, need_config=False, need_weights=False, progress=False)
    except ValueError as error:
        raise ValueError(f"no tokenizer for {name!r}: {error}\nName one with --tokenizer.") from None
    return Tokenizer.from_pretrained(folder)


def make_samples(config: DatasetConfig, tokenizer: Tokenizer, seed: int) -> list[Sample]:
    """`num_prompts` requests; the same ones for the same seed.

    Raises:
      ValueError: the dataset's file cannot be used.
    """
    if config.dataset_name == "random":
        return _random_samples(config, tokenizer, seed)
    return _sharegpt_samples(config, tokenizer, seed)


def random_prompts(tokenizer: Tokenizer, lengths: list[int], rng: np.random.Generator) -> list[str]:
    """Texts of so many tokens each, of words that the tokenizer knows and never joins with their neighbours."""
    ids = range(tokenizer.vocab_size)
    texts = [tokenizer.token_bytes(i).decode() for i in ids if _WORD.fullmatch(tokenizer.token_bytes(i))]
    words = [text for text in texts if len(tokenizer.encode(text)) == 1]
    if not words:
        raise ValueError("the tokenizer has no words to make random prompts of: name another one with --tokenizer.")
    return ["".join([words[i] for i in rng.integers(len(words), size=length)]) for length in lengths]


def _random_samples(config: DatasetConfig, tokenizer: Tokenizer, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    inputs = _lengths(rng, config.input_len or config.random_input_len, config)
    outputs = _lengths(rng, config.output_len or config.random_output_len, config)
    prefix, *prompts = random_prompts(tokenizer, [config.random_prefix_len, *inputs], rng)
    return [
        Sample(prefix + prompt, config.random_prefix_len + num_in, num_out)
        for prompt, num_in, num_out in zip(prompts, inputs, outputs, strict=True)
    ]


def _lengths(rng: np.random.Generator, length: int, config: DatasetConfig) -> list[int]:
    """Evenly distributed in [length × (1 − ratio), length × (1 + ratio)]."""
    spread = config.random_range_ratio * length
    low, high = max(1, int(length - spread)), int(np.ceil(length + spread))
    return rng.integers(low, high, size=config.num_prompts, endpoint=True).tolist()


def _sharegpt_samples(config: DatasetConfig, tokenizer: Tokenizer, seed: int) -> list[Sample]:
    """First question and length of its answer. As vLLM does it, very short and very long ones are left out."""
    assert config.dataset_path is not None
    try:
        with open(config.dataset_path, encoding="utf-8") as file:
            data = json.load(file)
        turns = [[t["value"] for t in entry["conversations"][:2]] for entry in data if len(entry["conversations"]) > 1]
    except OSError as error:
        raise ValueError(f"dataset_path {config.dataset_path!r} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        form = '[{"conversations": [{"value": …}, {"value": …}]}]'
        raise ValueError(f"dataset_path {config.dataset_path!r} is not of the form {form}: {error!r}.") from None
    random.Random(seed).shuffle(turns)
    samples = []
    for prompt, answer in turns:
        num_in, num_answer = len(tokenizer.encode(prompt)), len(tokenizer.encode(answer))
        num_out = config.output_len or num_answer
        is_short = num_in < 4 or (config.output_len is None and num_answer < 4)
        if not is_short and num_in <= 1024 and num_in + num_out <= 2048:
            samples.append(Sample(prompt, num_in, num_out))
            if len(samples) == config.num_prompts:
                break
    if not samples:
        raise ValueError(f"dataset_path {config.dataset_path!r} has no conversation of a usable length.")
    return list(itertools.islice(itertools.cycle(samples), config.num_prompts))

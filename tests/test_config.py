"""The options: what they accept, and what they say when they do not."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qjax.config import (
    EngineConfig,
    ServerConfig,
    describe,
    flag_of,
    kind_of,
    parse_bytes,
    parse_length,
)

FIELDS = [*fields(EngineConfig), *fields(ServerConfig)]


@pytest.mark.parametrize(
    ("text", "length"),
    [("4096", 4096), (4096, 4096), ("32k", 32000), ("32K", 32768), ("25.6k", 25600), ("1M", 1 << 20)]
    + [(text, "auto") for text in ("auto", "-1", -1)],
)
def test_lengths(text: Any, length: Any) -> None:
    assert parse_length(text) == length
    assert EngineConfig(model="m", max_model_len=text).max_model_len == length


@pytest.mark.parametrize("text", ["", "abc", "0", "-5", "4096 tokens", True, 1.5])
def test_wrong_lengths(text: Any) -> None:
    with pytest.raises(ValueError, match="max_model_len must be a number of tokens such as 4096, 32k or 'auto'"):
        EngineConfig(max_model_len=text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("4G", 4 << 30), ("4gb", 4 << 30), ("500M", 500 << 20), (12345, 12345), ("1.5k", 1536)],
)
def test_bytes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be in \(0, 1\], got 1.5"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization must be of type float, got '0.9'"),
        ({"max_num_seqs": "8"}, "max_num_seqs must be of type int, got '8'"),
        ({"max_num_seqs": True}, "max_num_seqs must be of type int, got True"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"block_size": 7}, "block_size must be 16, 32, 64 or 128, got 7"),
        ({"dtype": "float16"}, "dtype must be one of auto, bfloat16, float32, got 'float16'"),
        ({"enforce_eager": 1}, "enforce_eager must be of type bool, got 1"),
        ({"hf_overrides": "{"}, "hf_overrides: expected a JSON object, got '{'"),
        ({"hf_overrides": [1]}, r"hf_overrides: expected a JSON object, got \[1\]"),
        ({"kv_cache_memory_bytes": "lots"}, "kv_cache_memory_bytes: a memory size is a number of bytes"),
        ({"model": 5}, "model must be of type str, got 5"),
    ],
)
def test_wrong_values_name_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, r"port must be in \[0, 65535\]"),
        ({"shutdown_timeout": -1}, "shutdown_timeout must be at least 0"),
        ({"api_key": 5}, "api_key must be of type list"),
    ],
)
def test_wrong_server_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerConfig(**options)


def test_values_are_brought_into_one_form() -> None:
    config = EngineConfig(
        model=Path("some/folder"),  # type: ignore[arg-type]
        hf_overrides=None,  # type: ignore[arg-type]
        rope_scaling='{"rope_type": "yarn"}',  # type: ignore[arg-type]
        gpu_memory_utilization=1,
    )
    assert config.model == "some/folder"
    assert config.hf_overrides == {}
    assert config.rope_scaling == {"rope_type": "yarn"}
    assert isinstance(config.gpu_memory_utilization, float)
    assert ServerConfig(api_key="key").api_key == ["key"]  # type: ignore[arg-type]


def test_secrets_are_not_in_repr() -> None:
    assert "hunter2" not in repr(EngineConfig(hf_token="hunter2"))
    assert "hunter2" not in repr(ServerConfig(api_key=["hunter2"]))


def test_defaults_are_their_own_objects() -> None:
    ServerConfig().api_key.append("key")
    assert ServerConfig().api_key == []


def test_every_field_can_be_documented() -> None:
    names = [f.name for f in FIELDS]
    assert len(names) == len(set(names)), "flags of both classes share one command line"
    for f in FIELDS:
        text, default = describe(f)
        assert text and default and not text.endswith("."), f.name
        assert kind_of(f).base in (str, int, float, bool, list, dict), f.name
    by_name = {f.name: f for f in FIELDS}
    assert describe(by_name["max_num_seqs"]) == ("Requests that run at a time", "GPU 256, CPU 32")
    assert describe(by_name["enforce_eager"])[1] == "off"
    assert describe(by_name["rope_scaling"])[1] == "none"
    assert flag_of(by_name["max_model_len"]) == "--max-model-len"
    assert kind_of(by_name["max_model_len"]).choices == ("auto",)


def test_the_old_switch_of_the_reasoning_parser():
    assert ServerConfig(reasoning_parser="qwen3").reasoning_parser == "qwen3"
    assert ServerConfig(reasoning_parser="qwen3", enable_reasoning=False).reasoning_parser == "none"

"""`qjax collect-env`: what a bug report needs is there, and no secret is."""

import importlib.metadata

import pytest

from qjax import collect_env


@pytest.fixture
def variables(monkeypatch):
    """Sets variables of the environment."""
    for name in collect_env.environment():
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_the_report(variables):
    variables(QJAX_MAX_MODEL_LEN="4k", HF_TOKEN="hf_abcdefghijkl", PATH_TO_NOTHING="x")
    text = collect_env.report()
    sections = [line for line in text.splitlines() if line.startswith("== ")]
    assert sections == ["== Versions", "== System", "== Environment", "== Devices"]
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    assert rows["jax"].strip() == importlib.metadata.version("jax")
    assert rows["qjax"].strip() == importlib.metadata.version("qjax")
    assert {"python", "jaxlib", "flax", "transformers", "os", "cpu", "usable cores", "memory", "jax 0"} <= set(rows)
    assert rows["QJAX_MAX_MODEL_LEN"].strip() == "4k" and rows["HF_TOKEN"].strip() == "(set, not shown)"
    assert rows["jax 0"].strip().startswith("cpu")
    assert "hf_abc" not in text and "PATH_TO_NOTHING" not in text


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("QJAX_API_KEY", "abc", "(set, not shown)"),
        ("QJAX_API_KEY", "", ""),
        ("HF_HUB_PASSWORD", "abc", "(set, not shown)"),
        ("HF_ENDPOINT", "https://me:abc@hub.example/x", "https://(not shown)@hub.example/x"),
        ("XLA_FLAGS", "--xla_dump_to=/tmp --key=sk-abc12345678", "--xla_dump_to=/tmp --key=(not shown)"),
        ("JAX_PLATFORMS", "cpu", "cpu"),
    ],
)
def test_secrets_are_not_shown(variables, name, value, shown):
    variables(**{name: value})
    assert collect_env.environment()[name] == shown


def test_a_broken_jax_is_in_the_report(monkeypatch):
    import jax

    def fail():
        raise RuntimeError("no driver")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("PATH", "/nowhere")
    assert collect_env.devices() == {
        "nvidia-smi": "not available (FileNotFoundError)",
        "jax": "RuntimeError: no driver",
    }


def test_no_variables(variables):
    variables()
    assert list(collect_env.environment()) == ["none set"]

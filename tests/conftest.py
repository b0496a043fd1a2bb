"""What every test shares: eight CPU devices to split models over, and a tiny checkpoint."""

import os

# Read when jax first makes its devices. Meshes of one device use the first; nothing else changes.
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import pytest  # noqa: E402

from tests.tiny import write_checkpoint  # noqa: E402


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Hugging Face folder of a random Qwen3 (vocabulary 160, two layers, bfloat16), without a tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    write_checkpoint(folder)
    return folder

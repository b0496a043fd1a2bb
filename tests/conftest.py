"""What every test shares: eight CPU devices to split models over, and a tiny checkpoint."""

import importlib.util
import os

# The extra `aot` brings jax's CUDA plugin without CUDA's libraries: it compiles, and runs nothing.
has_cuda = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn")
if importlib.util.find_spec("jax_cuda13_plugin") and not has_cuda:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

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

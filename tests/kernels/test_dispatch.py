"""Which implementation runs where."""

from types import SimpleNamespace

import jax
import pytest

from qjax.kernels import dispatch as module
from qjax.kernels.dispatch import dispatch, is_hopper


def unsupported(interpret: bool):
    raise NotImplementedError


reference = lambda: "reference"
mosaic = lambda interpret: f"mosaic, interpret={interpret}"


def test_cpu_runs_the_reference():
    assert not is_hopper()
    assert dispatch(None, reference, mosaic) == "reference"


def test_hopper_tries_the_kernel_first(monkeypatch):
    monkeypatch.setattr(module, "is_hopper", lambda: True)
    assert dispatch(None, reference, mosaic) == "mosaic, interpret=False"
    assert dispatch(None, reference, unsupported) == "reference"


def test_a_named_implementation_has_no_fallback():
    assert dispatch("reference", reference, mosaic) == "reference"
    assert dispatch("interpret", reference, mosaic) == "mosaic, interpret=True"
    with pytest.raises(NotImplementedError):
        dispatch("mosaic_gpu", reference, unsupported)
    with pytest.raises(ValueError, match="cuda"):
        dispatch("cuda", reference, mosaic)


@pytest.mark.parametrize(("kind", "expected"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100-SXM4-40GB", False)])
def test_a_described_device_counts(monkeypatch, kind: str, expected: bool):
    mesh = SimpleNamespace(abstract_device=SimpleNamespace(device_kind=kind))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert is_hopper() is expected

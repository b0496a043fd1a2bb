"""Picks an implementation of an operation. An implementation that cannot do a case raises `NotImplementedError`."""

from collections.abc import Callable

import jax

IMPLEMENTATIONS = ("reference", "mosaic_gpu", "interpret")


def is_hopper() -> bool:
    """True where the code being traced will run on an sm_90 GPU, a described one without hardware included."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None and described.device_kind:
        return any(name in described.device_kind for name in ("H100", "H200", "H800", "GH200", "H20"))
    device = jax.config.jax_default_device
    if not isinstance(device, jax.Device):  # None, or the name of a platform
        device = jax.devices(device)[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"


def dispatch(implementation: str | None, reference: Callable, mosaic: Callable):
    """Calls `mosaic(interpret=...)` or `reference()`; None means the fastest that supports the case here."""
    if implementation is None:
        if is_hopper():
            try:
                return mosaic(interpret=False)
            except NotImplementedError:
                pass
        return reference()
    if implementation == "reference":
        return reference()
    if implementation in IMPLEMENTATIONS:
        return mosaic(interpret=implementation == "interpret")
    raise ValueError(f"implementation must be one of {IMPLEMENTATIONS} or None, got {implementation!r}")

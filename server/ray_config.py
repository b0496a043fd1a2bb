"""The options of replicas on Ray Serve, under Ray's own names. Imports no Ray."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qjax.config import EngineConfig, ServerConfig, coerce_fields, option

_PROXY = "requests come through Ray's own proxy"
# Of `ServerConfig`: what means nothing to a replica behind Ray's proxy, or cannot be had there, and why.
NOT_ON_RAY = {
    "uds": _PROXY,
    "send_timeout": _PROXY,
    "ssl_ca_certs": _PROXY,
    "ssl_cert_reqs": _PROXY,
    "headless": "a replica is one engine on one host",
    "data_parallel_size": "Ray keeps the replicas (--min-replicas, --max-replicas)",
    "server_dev_mode": "a replica that sleeps would be replaced, and a new one is awake",
}


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """How many replicas there are, where, and what each reserves.

    Raises:
      ValueError: a value is out of range; the message names the option.
    """

    ray_address: str | None = option(
        None,
        "Ray cluster to join, such as auto [RAY_ADDRESS, else Ray is started on this machine]",
        group="Ray",
        metavar="ADDRESS",
    )
    min_replicas: int = option(1, "Replicas that are always there", group="Ray")
    max_replicas: int | None = option(None, "Replicas under load [as --min-replicas]", group="Ray")
    target_ongoing_requests: float = option(
        64.0, "Requests a replica should have: with more of them replicas are added, with fewer taken away", group="Ray"
    )
    max_ongoing_requests: int = option(
        512, "Most requests a replica is sent; more wait for a place on any of them", group="Ray"
    )
    upscale_delay_s: float = option(30.0, "How long there must be too many requests", group="Ray", metavar="SECONDS")
    downscale_delay_s: float = option(600.0, "How long there must be too few", group="Ray", metavar="SECONDS")
    num_cpus: float = option(1.0, "CPU cores that a replica reserves", group="Ray")
    num_gpus: float | None = option(
        None, "GPUs that a replica reserves [--tensor-parallel-size where the cluster has GPUs, else 0]", group="Ray"
    )
    num_routers: int = option(
        1, "Processes that choose replicas and pass answers on; each knows only what it sent itself", group="Ray"
    )

    def __post_init__(self) -> None:
        coerce_fields(self)
        least = {"min_replicas": 1, "max_ongoing_requests": 1, "num_routers": 1, "num_cpus": 0, "num_gpus": 0}
        least |= {"upscale_delay_s": 0, "downscale_delay_s": 0}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ValueError(f"{name} must be at least {limit}, got {value}.")
        if self.target_ongoing_requests <= 0:
            raise ValueError(f"target_ongoing_requests must be above 0, got {self.target_ongoing_requests}.")
        if self.num_replicas_at_most < self.min_replicas:
            raise ValueError(
                f"max_replicas must be at least min_replicas={self.min_replicas}, got {self.max_replicas}."
            )
        if (self.ray_address or "").startswith("ray://"):
            raise ValueError("ray_address must be of the cluster itself (auto, or HOST:6379), not of a Ray client.")

    @property
    def num_replicas_at_most(self) -> int:
        return self.min_replicas if self.max_replicas is None else self.max_replicas


def check_fits_ray(engine: EngineConfig, server: ServerConfig) -> None:
    """Raises ValueError for an option that means nothing, or cannot be had, behind Ray's proxy."""
    defaults = ServerConfig()
    for name, reason in NOT_ON_RAY.items():
        if getattr(server, name) != getattr(defaults, name):
            raise ValueError(f"{name} is not supported on Ray Serve: {reason}.")
    if engine.nnodes != 1:
        raise ValueError(f"nnodes must be 1 on Ray Serve, where a replica is one engine on one host: {engine.nnodes}.")
    if server.port == 0:
        raise ValueError("port must be a fixed one on Ray Serve, got 0.")


def read_args(args: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig, RayConfig]:
    """The options of one flat mapping, by the names of their fields.

    Raises:
      ValueError: an unknown option, or a wrong value.
    """
    configs = (EngineConfig, ServerConfig, RayConfig)
    names = [{f.name for f in fields(config)} for config in configs]
    if unknown := sorted(args.keys() - set().union(*names)):
        raise ValueError(f"unknown options in args: {', '.join(unknown)}.")
    engine, server, ray = ({n: v for n, v in args.items() if n in known} for known in names)
    return EngineConfig(**engine), ServerConfig(**server), RayConfig(**ray)

"""The command line and environment of a replica: the front's, but for where it listens and whom it trusts."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from qjax.config import EngineConfig, ServerConfig, default_of, environment_name_of, flag_of, kind_of
from qjax.logs import REPLICA
from qjax.server.front.child import FRONT

_ROOM_SIZE, _ROOM_COUNT = 1024, 16  # for the headers that the front adds
_ANSWERED_BY_FRONT = ["/health", "/metrics", "/load"]


def replica_config(config: ServerConfig, uds: str) -> ServerConfig:
    """A replica listens on a socket in a folder that only this user can open. The front has checked keys and origins,
    has ended TLS, and drops clients that do not read.
    """
    return dataclasses.replace(
        config,
        data_parallel_size=1,
        uds=uds,
        **{name: default_of(f) for f in dataclasses.fields(config) if (name := f.name) in _FRONTS_OWN},
        enable_chat_page=False,
        send_timeout=0.0,
        max_header_size=config.max_header_size + _ROOM_SIZE,
        max_header_count=config.max_header_count + _ROOM_COUNT,
        disable_access_log_for_endpoints=[*config.disable_access_log_for_endpoints, *_ANSWERED_BY_FRONT],
    )


_FRONTS_OWN = (
    *("host", "port", "api_key", "root_path", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs"),
    *("allowed_origins", "allowed_methods", "allowed_headers", "allow_credentials"),
)


def command(engine: EngineConfig, server: ServerConfig) -> list[str]:
    """`qjax serve` with these options. Secrets are not among them: other users see command lines."""
    flags = [flag for config in (engine, server) for flag in _flags(config)]
    return [sys.executable, "-m", "qjax", "serve", *flags]


def environment(engine: EngineConfig, index: int, devices: Mapping[str, str]) -> dict[str, str]:
    """The front's own without its options, which are flags now, and with the secrets that are not."""
    names = {environment_name_of(f) for config in (EngineConfig, ServerConfig) for f in dataclasses.fields(config)}
    environ = {name: value for name, value in os.environ.items() if name not in names}
    secrets = {"QJAX_HF_TOKEN": engine.hf_token} if engine.hf_token else {}
    return {**environ, **secrets, **devices, REPLICA: str(index), FRONT: str(os.getpid())}


def _flags(config: Any) -> Iterator[str]:
    """What differs from the defaults."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if (value == default_of(f) and f.name != "model") or not f.repr:
            continue
        if kind_of(f).base is bool:
            yield flag_of(f) if value else flag_of(f).replace("--", "--no-", 1)
        else:
            for part in value if isinstance(value, list) else [value]:
                yield f"{flag_of(f)}={json.dumps(part) if isinstance(part, dict) else part}"

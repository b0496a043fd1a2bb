"""`qjax ray`: replicas of the server on Ray Serve. Ray is imported when the command runs."""

import argparse
from dataclasses import fields
from typing import Any

from qjax.cli.commands import add_model_command
from qjax.cli.options import add_model_flag, add_options, read_config, read_engine_config
from qjax.config import EngineConfig, ServerConfig


def add_ray(commands: Any) -> None:
    from qjax.server.ray_config import NOT_ON_RAY, RayConfig

    description = "Serves replicas of a model on Ray Serve, as many as the requests need. Needs the extra `ray`."
    ray = add_model_command(commands, "ray", _ray, description)
    add_model_flag(ray)
    add_options(ray, RayConfig)
    add_options(ray, EngineConfig)
    add_options(ray, ServerConfig, tuple(f.name for f in fields(ServerConfig) if f.name not in NOT_ON_RAY))


def _ray(args: argparse.Namespace) -> int:
    from qjax.server.ray_config import RayConfig

    engine, server, options = read_engine_config(args), read_config(ServerConfig, args), read_config(RayConfig, args)
    from qjax import logs
    from qjax.server import ray_app

    logs.set_format(server.log_format)
    return ray_app.run(engine, server, options)

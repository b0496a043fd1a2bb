"""Options of replicas on Ray: what is taken, refused, documented, and handed to a replica's server. Needs no Ray."""

import json
import re
from dataclasses import fields

import pytest

from qjax.cli import make_parser
from qjax.config import EngineConfig, ServerConfig, flag_of
from qjax.server.ray_child import to_line
from qjax.server.ray_config import NOT_ON_RAY, RayConfig, check_fits_ray
from tests.test_docs import ROOT


def test_options_reach_the_child_whole():
    engine = EngineConfig(hf_token="secret", hf_overrides={"a": [1]}, max_model_len="32k")
    server = ServerConfig(api_key=["a,b", "c"], max_body_size="1MiB")
    line = to_line(engine, server)
    given = json.loads(line)
    assert line.count(b"\n") == 1 and EngineConfig(**given[0]) == engine and ServerConfig(**given[1]) == server


@pytest.mark.parametrize(
    "options",
    [
        {"min_replicas": 0},
        {"min_replicas": 3, "max_replicas": 2},
        {"target_ongoing_requests": 0},
        {"ray_address": "ray://head:10001"},
        {"num_gpus": -1},
        {"downscale_delay_s": -1.0},
    ],
)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(reversed(options)))):
        RayConfig(**options)


@pytest.mark.parametrize(
    "server",
    [
        {"uds": "/tmp/x"},
        {"headless": True},
        {"server_dev_mode": True},
        {"send_timeout": 5.0},
        {"data_parallel_size": 2},
        {"port": 0},
    ],
)
def test_what_ray_cannot_do_is_refused(server):
    with pytest.raises(ValueError, match=next(iter(server))):
        check_fits_ray(EngineConfig(), ServerConfig(**server))
    assert set(server) <= {*NOT_ON_RAY, "port"}


def test_several_hosts_are_refused():
    with pytest.raises(ValueError, match="nnodes must be 1"):
        check_fits_ray(EngineConfig(nnodes=2), ServerConfig())
    check_fits_ray(EngineConfig(), ServerConfig())


def test_the_flags_are_those_of_serve_and_the_documented_ones():
    commands = make_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    flags = {name: {f for a in commands[name]._actions for f in a.option_strings} for name in ("ray", "serve")}
    own = {flag_of(f) for f in fields(RayConfig)}
    left_out = {"--" + name.replace("_", "-") for name in NOT_ON_RAY}
    assert flags["ray"] - flags["serve"] == own
    missing = {flag.replace("--no-", "--") for flag in flags["serve"] - flags["ray"]}
    assert {flag for flag in missing if flag.startswith("--")} == left_out
    section = (ROOT / "docs" / "operating.md").read_text().split("## Replicas on Ray Serve")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `--")]
    assert set(re.findall(r"`(--[a-z-]+)`", " ".join(rows))) == own

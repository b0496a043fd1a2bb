"""Answers of several replicas as one: metrics that Prometheus' own parser reads, sums, and what all must say."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qjax.config import EngineConfig, ServerConfig
from qjax.engine.metrics import Metrics
from qjax.server.merged_answers import merge_bodies, merge_json, merge_metrics
from qjax.server.ray_child import to_line
from qjax.server.ray_config import NOT_ON_RAY, RayConfig, check_fits_ray


def samples(text: str) -> dict[tuple[str, frozenset], float]:
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a metric's samples stand together"
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_metrics_keep_every_sample_under_its_replica():
    one, two = Metrics("m", 4096), Metrics("m", 4096)
    one.on_step(running=3, waiting=1, kv_usage=0.5)
    two.on_step(running=5, waiting=0, kv_usage=0.25)
    two.on_preempted(7)
    texts = {"a": one.render().decode(), "b": two.render().decode()}
    merged = samples(merge_metrics(texts))
    expected = {
        (name, labels | {("replica", replica)}): value
        for replica, text in texts.items()
        for (name, labels), value in samples(text).items()
    }
    assert merged == expected and len(merged) == 2 * len(samples(texts["a"]))


def test_a_sample_without_labels_gets_one():
    assert merge_metrics({"a": "# HELP x y\n# TYPE x gauge\nx 1.0\n"}).endswith('x{replica="a"} 1.0\n')


def test_json():
    assert merge_json([{"server_load": 1, "num_queued": 2}, {"server_load": 3, "num_queued": 0}]) == {
        "server_load": 4,
        "num_queued": 2,
    }
    assert merge_json([{"success": True}, {"success": False}, {"success": True}]) == {"success": False}
    ended = [{"status": "aborted", "aborted": n, "request_ids": ids} for n, ids in ((0, []), (1, ["x"]), (1, ["y"]))]
    assert merge_json(ended) == {"status": "aborted", "aborted": 2, "request_ids": ["x", "y"]}
    assert json.loads(merge_bodies([b'{"a": 1}', b'{"a": 2}'])) == {"a": 3}


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
    [{"uds": "/tmp/x"}, {"headless": True}, {"server_dev_mode": True}, {"send_timeout": 5.0}, {"port": 0}],
)
def test_what_ray_cannot_do_is_refused(server):
    with pytest.raises(ValueError, match=next(iter(server))):
        check_fits_ray(EngineConfig(), ServerConfig(**server))
    assert set(server) <= {*NOT_ON_RAY, "port"}


def test_several_hosts_are_refused():
    with pytest.raises(ValueError, match="nnodes must be 1"):
        check_fits_ray(EngineConfig(nnodes=2), ServerConfig())
    check_fits_ray(EngineConfig(), ServerConfig())

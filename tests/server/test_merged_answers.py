"""Answers of several replicas as one: metrics that Prometheus' own parser reads, sums, and what all must say."""

import json

from prometheus_client.parser import text_string_to_metric_families

from qjax.engine.metrics import Metrics
from qjax.server.merged_answers import merge_bodies, merge_json, merge_metrics


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

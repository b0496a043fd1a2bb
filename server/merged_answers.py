"""One answer of several replicas: metrics, loads, and what was done by all of them. Pure functions."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def merge_metrics(texts: Mapping[str, str], label: str = "replica") -> str:
    """Prometheus' texts of several replicas as one: each sample gets a label with its replica's name.

    Samples of a metric must stand together in each text, under its `# HELP`, as prometheus_client writes them.
    """
    heads: dict[str, list[str]] = {}  # metric -> its comment lines, of the first replica that has it
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        metric, is_new = "", True
        for line in text.splitlines():
            if line.startswith("# HELP "):
                metric = line.split(" ", 3)[2]
                is_new = metric not in heads
                heads.setdefault(metric, [])
            if line.startswith("#"):
                if is_new:
                    heads[metric].append(line)
            elif line:
                samples.setdefault(metric, []).append(_labelled(line, f'{label}="{replica}"'))
    return "".join(f"{line}\n" for metric, head in heads.items() for line in (*head, *samples.get(metric, [])))


def _labelled(sample: str, label: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"


def merge_json(bodies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers are added up, lists joined, and what is said is true only if all say it; of other values the first."""
    merged = dict(bodies[0])
    for body in bodies[1:]:
        for name, value in body.items():
            if isinstance(value, bool):
                merged[name] = bool(merged.get(name)) and value
            elif isinstance(value, int | float | list) and name in merged:
                merged[name] += value
    return merged


def merge_bodies(bodies: Sequence[bytes]) -> bytes:
    """`merge_json` of answers as they came."""
    return json.dumps(merge_json([json.loads(body) for body in bodies])).encode()

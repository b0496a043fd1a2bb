"""The simulation of replicas: what can be worked out by hand, and the throughput of one H100 that was measured."""

import random

import pytest

from scripts.simulate_serving import (
    Replica,
    Request,
    Steps,
    Talk,
    conversations,
    report,
    simulate,
    throughputs,
)

STEPS = Steps(((1, 0.010), (8, 0.017)), prefill=0.001)


def run(num_replicas: int, requests: list[Request], router: str = "load", kv_tokens: int = 10_000) -> list[Request]:
    replicas = [Replica(STEPS, 8, 64, kv_tokens) for _ in range(num_replicas)]
    return simulate(replicas, requests, router, random.Random(0))


def test_one_request():
    """100 prompt tokens are two steps, of 64 and of 36 tokens, then 9 steps of one request."""
    [request] = run(1, [Request(1.0, 100, 10)])
    assert request.first == pytest.approx(1.0 + 0.1) and request.done == pytest.approx(1.1 + 9 * 0.010)


def test_a_second_replica_halves_the_wait():
    one, two = (max(r.first for r in run(n, [Request(0.0, 64, 1) for _ in range(8)])) for n in (1, 2))
    assert one == pytest.approx(8 * 0.064) and two == pytest.approx(4 * 0.064)


def test_what_has_no_room_waits():
    first, second = run(1, [Request(0.0, 60, 40), Request(0.0, 60, 40)], kv_tokens=150)
    assert second.first > first.done


def test_a_prompt_is_cached_once_it_is_computed():
    blocks = [1, 2]
    together = run(1, [Request(0.0, 128, 1, blocks, blocks) for _ in range(2)])
    assert [r.num_cached for r in together] == [0, 0]
    later = run(1, [Request(0.0, 128, 1, blocks, blocks), Request(1.0, 128, 1, blocks, blocks)])
    assert [r.num_cached for r in later] == [0, 127]


def test_the_choice_by_prefix_finds_more_in_the_caches():
    shares = {}
    for router in ("prefix", "random"):
        rng = random.Random(0)
        talks = conversations(Talk(128, 64, 16, 4, 1.0), 2.0, 30.0, rng)
        replicas = [Replica(STEPS, 8, 64, 10_000) for _ in range(4)]
        shares[router] = report(simulate(replicas, talks, router, rng), replicas)["cached_share"]
    assert shares["prefix"] > shares["random"] + 0.2


@pytest.mark.parametrize("file", ["2026-11-23c.jsonl", "2026-11-24b.jsonl"])
@pytest.mark.parametrize("model", ["Qwen3-8B", "Qwen3-0.6B"])
def test_beside_a_measured_run(model: str, file: str):
    simulated, measured = throughputs(model, file)
    assert simulated == pytest.approx(measured, rel=0.1)

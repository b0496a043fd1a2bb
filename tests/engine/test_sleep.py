"""Sleep and wake-up: the same answers after as before, no memory on the devices in between, nothing compiled anew."""

import asyncio
import threading
import time

import jax
import pytest

from qjax import SamplingParams
from qjax.engine.async_engine import AsyncEngine
from tests.engine.test_async_engine import LONG, SHORT, collect, config

PROMPT = [7] * 10


def answers(llm):
    return [output.outputs[0] for output in llm.generate([PROMPT], SHORT, use_tqdm=False)]


@pytest.mark.parametrize("level", [1, 2])
def test_what_sleeps_is_gone_and_comes_back(llm, level):
    before = answers(llm)
    runner = llm.engine.runner
    arrays = [*runner.leaves, runner.kv, *jax.tree.leaves(runner.state)]
    placed, num_compiles = [leaf.sharding for leaf in runner.leaves], runner.compiles.count
    llm.sleep(level)
    assert all(array.is_deleted() for array in arrays) and runner.leaves == ()
    for call in (lambda: answers(llm), lambda: llm.sleep(level), lambda: llm.update_weights([])):
        with pytest.raises(ValueError, match="sleeps"):
            call()
    llm.wake_up()
    assert answers(llm) == before
    assert [leaf.sharding for leaf in runner.leaves] == placed and runner.compiles.count == num_compiles
    llm.engine.scheduler.check_integrity()


def test_one_thing_after_the_other(llm):
    before = answers(llm)
    weights = [leaf * 1.0 for leaf in llm.engine.runner.leaves]
    llm.sleep(level=1)
    llm.wake_up(tags=["weights"])
    llm.update_weights(weights)  # before there is a KV cache
    with pytest.raises(ValueError, match=r"sleeps \(kv_cache\)"):
        answers(llm)
    llm.wake_up(tags=["kv_cache"])
    assert answers(llm) == before
    llm.wake_up()  # what is awake stays so
    assert answers(llm) == before


def test_wrong_calls_are_named(llm):
    with pytest.raises(ValueError, match="level must be 1"):
        llm.sleep(level=3)
    with pytest.raises(ValueError, match="weights, kv_cache"):
        llm.wake_up(tags=["scheduling"])
    llm.engine.add_request("runs", PROMPT, LONG)
    with pytest.raises(ValueError, match=r"1 request\(s\) run"):
        llm.sleep()
    llm.engine.abort("runs")
    assert answers(llm)


@pytest.fixture
async def engine(tiny_folder):
    engine = AsyncEngine(config(tiny_folder))
    engine.start()
    await engine.wait_ready()
    yield engine
    await engine.shutdown()


async def test_what_runs_is_aborted(engine):
    short, _ = await collect(engine, PROMPT, SHORT, "before")
    running = asyncio.ensure_future(collect(engine, PROMPT, LONG, "running"))
    while not engine.num_running:
        await asyncio.sleep(0.001)
    asleep = asyncio.ensure_future(engine.sleep(2))
    await asyncio.sleep(0)
    assert engine.is_sleeping
    await asleep
    assert (await running)[1] == "abort"
    with pytest.raises(ValueError, match="sleeps"):
        await collect(engine, PROMPT, SHORT, "asleep")
    with pytest.raises(ValueError, match="sleeps"):
        await engine.sleep(1)
    assert engine.is_sleeping and await engine.reset_prefix_cache()
    await engine.wake_up(["kv_cache"])
    assert engine.is_sleeping
    await engine.wake_up()
    assert not engine.is_sleeping
    assert (await collect(engine, PROMPT, SHORT, "after"))[0] == short


class TestWatch:
    async def test_a_step_that_does_not_end_is_seen_and_compiling_is_none(self, engine):
        runner = engine.engine.runner
        assert engine.seconds_stalled == 0.0
        await collect(engine, PROMPT, SHORT, "warm")
        collect_step, go_on = runner.collect, threading.Event()

        def hang(flight):
            go_on.wait(10)
            return collect_step(flight)

        runner.collect = hang
        hung = asyncio.ensure_future(collect(engine, PROMPT, SHORT, "hung"))
        while engine.seconds_stalled < 0.2:
            await asyncio.sleep(0.01)
        assert not await engine.shutdown(timeout=0.1)  # its thread does not end
        runner.compiles.is_running = True
        assert engine.seconds_stalled == 0.0
        runner.compiles.is_running, runner.compiles.ended = False, time.monotonic()
        assert engine.seconds_stalled < 0.2  # the clock begins where the compiler ended
        go_on.set()
        await hung
        assert await engine.shutdown(timeout=10) and engine.seconds_stalled == 0.0

    async def test_compiling_in_a_step(self, engine, monkeypatch):
        steps, seen = engine.engine.runner.compiles, []
        lookup = steps.traced.get

        def slow(key):
            seen.append((steps.is_running, engine.seconds_stalled))
            return lookup(key)

        monkeypatch.setattr(steps.traced, "get", slow)
        await collect(engine, PROMPT, SamplingParams(temperature=0.0, max_tokens=2, logprobs=5), "new shape")
        assert seen and all(is_running and stalled == 0.0 for is_running, stalled in seen)
        assert not engine.engine.runner.compiles.is_running

    async def test_the_queue_is_what_finds_no_place(self, engine):
        """Of 16 places, whether the engine has seen the requests yet or not."""
        tasks = [asyncio.ensure_future(collect(engine, PROMPT, LONG, str(i))) for i in range(20)]
        await asyncio.sleep(0)
        assert engine.num_queued() == 4 and engine.num_queued(more=2) == 6
        while engine.num_running < 16:
            await asyncio.sleep(0.001)
        assert engine.num_queued() == 4
        for i in range(20):
            engine.abort(str(i))
        await asyncio.gather(*tasks)
        assert engine.num_queued() == 0

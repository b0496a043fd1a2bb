"""The engine in its thread: streams, aborts, start-up errors, and an engine that dies."""

import asyncio
import json

import pytest
import pytest_asyncio

from qjax import EngineConfig, SamplingParams
from qjax.engine.async_engine import AsyncEngine, EngineDeadError

LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def config(folder):
    return EngineConfig(
        model=str(folder), load_format="dummy", kv_cache_memory_bytes="4MiB", max_num_seqs=16, max_num_batched_tokens=64
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny_folder):
    engine = AsyncEngine(config(tiny_folder))
    engine.start()
    assert engine.phase != "ready"
    await engine.wait_ready()
    yield engine
    await engine.shutdown()


async def collect(engine, prompt, params, request_id):
    tokens, reason = [], None
    async for output in engine.generate(prompt, params, request_id):
        for answer in output.outputs:
            tokens += answer.token_ids
            reason = answer.finish_reason
    return tokens, reason


async def idle(engine):
    while engine.num_running or engine.engine.has_work:
        await asyncio.sleep(0.01)
    engine.engine.scheduler.check_integrity()
    assert engine.num_unfinished == 0


@pytest.mark.asyncio(loop_scope="module")
async def test_streams_are_whole_and_independent(engine):
    assert engine.phase == "ready" and engine.max_model_len == 512
    alone = [(await collect(engine, [5 + i] * 20, SHORT, f"a{i}"))[0] for i in range(4)]
    together = await asyncio.gather(*(collect(engine, [5 + i % 4] * 20, SHORT, f"b{i}") for i in range(24)))
    assert [tokens for tokens, _ in together] == alone * 6
    assert {reason for _, reason in together} == {"length"}
    await idle(engine)


@pytest.mark.asyncio(loop_scope="module")
async def test_closing_a_stream_aborts_the_request(engine):
    stream = engine.generate([7] * 10, LONG, "closed")
    first = await anext(stream)
    assert first.request_id == "closed" and first.outputs[0].token_ids
    await stream.aclose()
    await idle(engine)


@pytest.mark.asyncio(loop_scope="module")
async def test_abort_ends_the_stream_with_its_reason(engine):
    task = asyncio.create_task(collect(engine, [7] * 10, LONG, "aborted"))
    other = asyncio.create_task(collect(engine, [9] * 10, SHORT, "other"))
    while engine.num_running < 2:
        await asyncio.sleep(0.001)
    engine.abort("aborted")
    tokens, reason = await task
    assert reason == "abort" and len(tokens) < 400
    assert (await other)[1] == "length"
    await idle(engine)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_bad_request_is_refused_before_it_starts(engine):
    with pytest.raises(ValueError, match="512 tokens"):
        await anext(engine.generate([1] * 600, SHORT, "too long"))
    with pytest.raises(ValueError, match="scheduling-policy"):
        await anext(engine.generate([1], SHORT, "priority", priority=3))
    stream = engine.generate([7] * 10, LONG, "twice")
    await anext(stream)
    with pytest.raises(ValueError, match="in use"):
        await anext(engine.generate([1], SHORT, "twice"))
    await stream.aclose()
    await idle(engine)


async def test_start_up_errors_reach_the_caller(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    engine = AsyncEngine(EngineConfig(model=str(tmp_path), load_format="dummy"))
    engine.start()
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        await engine.wait_ready()
    assert engine.phase == "failed"
    await engine.shutdown()


async def test_a_dead_engine_says_so_to_everyone(tiny_folder):
    engine = AsyncEngine(config(tiny_folder))
    engine.start()
    await engine.wait_ready()

    def broken(batch):
        raise RuntimeError("the device is gone")

    stream = engine.generate([7] * 10, LONG, "running")
    await anext(stream)
    engine.engine.runner.dispatch = broken
    with pytest.raises(EngineDeadError, match="the device is gone"):
        async for _ in stream:
            pass
    assert engine.phase == "failed" and isinstance(engine.error, RuntimeError)
    with pytest.raises(EngineDeadError):
        await anext(engine.generate([7], SHORT, "late"))
    await engine.shutdown()
    assert engine.phase == "failed"

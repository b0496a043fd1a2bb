"""`num_scheduler_steps`: groups of decode steps give the answers of single ones, whatever ends them."""

import random
from dataclasses import replace

import pytest

from qjax import LLM, SamplingParams
from qjax.config import EngineConfig
from qjax.engine.block_pool import BlockPool
from qjax.engine.memory import Device, plan
from qjax.engine.request import Request
from qjax.engine.scheduler import Scheduler, SchedulerConfig
from qjax.sampling_params import StructuredOutputsParams
from scripts.bench_floors import MODELS

PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=23, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=1),
    SamplingParams(temperature=1.0, top_k=20, top_p=0.9, seed=3, max_tokens=9),
    SamplingParams(temperature=1.0, seed=4, max_tokens=40, stop_token_ids=list(range(0, 6000, 9))),
    SamplingParams(temperature=0.0, max_tokens=60, stop=["a"]),
]
SPECIAL = [
    SamplingParams(temperature=0.0, max_tokens=8, logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=8, presence_penalty=1.5),
    SamplingParams(temperature=0.0, max_tokens=8, structured_outputs=StructuredOutputsParams(regex="[0-9]{5}")),
]


@pytest.fixture(scope="module")
def engines():
    """Few pages and a short context, so that requests lose theirs and reach the end of it."""
    options = {"max_model_len": 96, "max_num_seqs": 4, "kv_cache_memory_bytes": 3 * 2**20, "seed": 0}
    return LLM(**options), LLM(**options, num_scheduler_steps=4)


def answers(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[tuple]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.engine.scheduler.check_integrity()
    return [(o.outputs[0].token_ids, o.outputs[0].text, o.outputs[0].finish_reason) for o in outputs]


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_same_answers(engines, count: int):
    rng = random.Random(count)
    prompts = [[rng.randrange(30, 6000) for _ in range(rng.randrange(1, 60))] for _ in range(count)]
    params = [PARAMS[(i + count) % len(PARAMS)] for i in range(count)]
    single, grouped = engines
    assert answers(grouped, prompts, params) == answers(single, prompts, params)


def test_requests_that_need_the_host_go_step_by_step(engines):
    single, grouped = engines
    prompts = [[40 + i, 50, 60] for i in range(4)]
    assert answers(grouped, prompts, [*SPECIAL, PARAMS[0]]) == answers(single, prompts, [*SPECIAL, PARAMS[0]])


def test_a_group_is_one_dispatch(engines):
    _, grouped = engines
    steps = 0
    grouped.engine.add_request("one", [40, 50, 60], PARAMS[0])
    while grouped.engine.has_work:
        steps += 1
        grouped.engine.step()
    assert steps <= 2 + 23 / 4 + 2


def test_who_waits_gets_the_next_step():
    """A prompt, or a request for which there is no place, is looked at after each step."""
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=64, num_steps=4)
    s = Scheduler(config, BlockPool(20, 16, False))
    greedy = SamplingParams(temperature=0.0, max_tokens=30)
    s.add(Request("a", [1, 2, 3], greedy, 30))
    batch = s.schedule()
    assert (len(batch.prefills), batch.num_steps) == (1, 1)
    s.update(batch, [5])
    batch = s.schedule()
    assert (len(batch.decodes), batch.num_steps) == (1, 4)
    for _ in range(4):
        s.update(batch, [5])
    s.add(Request("b", [1, 2, 3], greedy, 30))
    assert s.schedule().num_steps == 1


@pytest.mark.parametrize("steps", [0, 17])
def test_wrong_numbers_are_refused(steps: int):
    with pytest.raises(ValueError, match="num_scheduler_steps must be 1 to 16"):
        LLM(num_scheduler_steps=steps)


@pytest.mark.parametrize(("model", "steps"), [("Qwen3-0.6B", 4), ("Qwen3-4B", 2), ("Qwen3-8B", 1)])
def test_small_models_take_several_on_a_gpu(model: str, steps: int):
    gpu, cpu = Device("gpu", memory_bytes=72 * 2**30), Device("cpu")
    config = EngineConfig(max_model_len=4096)
    assert plan(config, MODELS[model], gpu).num_scheduler_steps == steps
    assert plan(config, MODELS[model], cpu).num_scheduler_steps == 1
    assert plan(replace(config, num_scheduler_steps=3), MODELS[model], gpu).num_scheduler_steps == 3

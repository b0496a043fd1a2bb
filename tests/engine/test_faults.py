"""Steps that fail: who ends, who goes on with the same text, what is left behind, and when the engine is dead."""

import logging
import random

import numpy as np
import pytest

from qjax import SamplingParams
from qjax.engine import faults
from qjax.outputs import STEP_FAILED
from qjax.sampling_params import StructuredOutputsParams
from tests.engine.conftest import make_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True)
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes."
PROMPTS = [[5 + i, 6, 7, 8 + i] * (1 + i % 8) for i in range(22)]  # more than run at a time


@pytest.fixture(scope="module")
def llm(tiny_folder):
    return make_llm(tiny_folder)


def run(engine, requests, at_step=lambda number: None):
    """Steps until all have ended: token ids and (finish reason, stop reason) by request."""
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    ids, ends, number = {i: [] for i in requests}, {}, 0
    while engine.has_work:
        at_step(number)
        for output in engine.step():
            [delta] = output.outputs
            ids[output.request_id] += delta.token_ids
            if delta.finish_reason:
                assert output.request_id not in ends, "it ended twice"
                ends[output.request_id] = (delta.finish_reason, delta.stop_reason)
        number += 1
        assert number < 3000
    engine.scheduler.check_integrity()
    assert engine.pool.usage == 0 and engine.num_running == 0 and not engine._answers
    assert set(ends) == set(requests)
    return ids, ends


def fail(monkeypatch, runner, method, number, error, *, consume=False):
    """The `number`-th call from now on fails, once; its donated arrays are gone if `consume`."""
    real, count = getattr(runner, method), [0]

    def call(argument):
        count[0] += 1
        if count[0] == number:
            if consume:
                runner.kv.delete()
                runner.state.page_table.delete()
            raise error
        return real(argument)

    monkeypatch.setattr(runner, method, call)


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("method", ["dispatch", "collect"])
@pytest.mark.parametrize("number", [1, 2, 9])
def test_the_requests_of_a_failed_step_end_and_the_others_go_on(llm, monkeypatch, caplog, method, number, consume):
    requests = {f"r{i}": (p, GREEDY if i % 2 else SAMPLED) for i, p in enumerate(PROMPTS)}
    expected, _ = run(llm.engine, requests)
    fail(monkeypatch, llm.engine.runner, method, number, RuntimeError("a bit flipped"), consume=consume)
    with caplog.at_level(logging.ERROR, "qjax"):
        ids, ends = run(llm.engine, requests)
    failed = {i for i, end in ends.items() if end == ("error", STEP_FAILED)}
    assert 1 <= len(failed) <= 16 < len(requests)
    for i in requests:
        if i in failed:
            assert ids[i] == expected[i][: len(ids[i])]
        else:
            assert ends[i] == ("length", None) and ids[i] == expected[i]
    [record] = caplog.records
    assert set(record.request_ids) == failed and all(i in record.message for i in failed)
    assert "a bit flipped" in str(record.exc_info[1])
    again, _ = run(llm.engine, requests)
    assert again == expected
    assert b"qjax:num_failed_steps_total" in llm.engine.metrics.render()


def test_nothing_of_a_failed_step_is_in_the_prefix_cache(llm, monkeypatch):
    """A page is registered when its step is dispatched, before the step has ended."""
    prompt = list(range(1, 60))
    expected, _ = run(llm.engine, {"r": (prompt, GREEDY)})
    assert llm.reset_prefix_cache()
    fail(monkeypatch, llm.engine.runner, "collect", 1, RuntimeError("lost"), consume=True)
    _, ends = run(llm.engine, {"r": (prompt, GREEDY)})
    assert ends["r"][0] == "error"
    ids, _ = run(llm.engine, {"again": (prompt, GREEDY)})
    assert ids["again"] == expected["r"]


def test_a_request_that_cannot_be_computed_ends_alone(llm, monkeypatch):
    others = {f"r{i}": (p, GREEDY) for i, p in enumerate(PROMPTS)}
    expected, _ = run(llm.engine, others)
    digits = GREEDY.with_(structured_outputs=StructuredOutputsParams(regex="[0-9]{9}"), ignore_eos=False)

    def break_it(step):
        if step == 3:
            request = llm.engine._answers["bad"][1].request
            monkeypatch.setattr(request.constraint, "fill", lambda mask: 1 // 0)

    ids, ends = run(llm.engine, {"bad": (PROMPTS[0], digits), **others}, break_it)
    assert ends.pop("bad") == ("error", STEP_FAILED) and set(ends.values()) == {("length", None)}
    ids.pop("bad")
    assert ids == expected


def test_a_bug_in_one_answers_text_ends_that_answer(llm, monkeypatch, caplog):
    others = {f"r{i}": (p, GREEDY) for i, p in enumerate(PROMPTS[:3])}
    expected, _ = run(llm.engine, others)

    def break_it(step):
        if step == 4:
            monkeypatch.setattr(llm.engine._answers["bad"][1].detokenizer, "append", lambda *_: 1 // 0)

    ids, ends = run(llm.engine, {"bad": (PROMPTS[5], GREEDY), **others}, break_it)
    assert ends.pop("bad") == ("error", None) and set(ends.values()) == {("length", None)}
    assert {i: ids[i] for i in others} == expected
    assert "request bad failed" in caplog.text and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("method", ["dispatch", "collect"])
def test_out_of_memory_makes_the_batch_smaller(llm, monkeypatch, caplog, method):
    """The device has room for six sequences: everybody is answered, and nothing is said twice."""
    monkeypatch.setattr(faults, "STEPS_UNTIL_LARGER", 15)
    engine, requests = llm.engine, {f"r{i}": (p, GREEDY) for i, p in enumerate(PROMPTS)}
    expected, _ = run(engine, requests)
    real, sizes = engine.runner.dispatch, []

    def has_room(batch):
        sizes.append(len(batch.decodes) + len(batch.prefills))
        return sizes[-1] <= 6

    def dispatch(batch):
        is_ok = has_room(batch)
        if method == "dispatch" and not is_ok:
            raise ValueError(OUT_OF_MEMORY)
        flight = real(batch)
        if not is_ok:
            object.__setattr__(flight, "out", Poisoned())
        return flight

    monkeypatch.setattr(engine.runner, "dispatch", dispatch)
    with caplog.at_level(logging.INFO, "qjax"):
        ids, ends = run(engine, requests)
    assert ids == expected and set(ends.values()) == {("length", None)}
    assert 1 <= sum(size > 6 for size in sizes) < 12, "it learns"
    assert "out of memory in a step of" in caplog.text and "--max-num-seqs" in caplog.text
    assert "a step again" in caplog.text, "it is tried again after a while"
    monkeypatch.setattr(engine.runner, "dispatch", real)
    for _ in range(3):
        run(engine, requests)
    assert (engine.scheduler.max_running, engine.recovery.is_short) == (16, False)


class Poisoned:
    """The output of a step that failed on the device."""

    def __array__(self, *_, **__):
        raise ValueError(OUT_OF_MEMORY)

    def is_ready(self):
        return True


def test_a_request_that_alone_has_no_room_ends(llm, monkeypatch):
    engine, real = llm.engine, llm.engine.runner.dispatch
    long = list(range(1, 61))

    def dispatch(batch):
        if any(len(c.request.prompt_token_ids) == 60 for c in (*batch.decodes, *batch.prefills)):
            raise ValueError(OUT_OF_MEMORY)
        return real(batch)

    expected, _ = run(engine, {"short": ([4, 5], GREEDY)})
    monkeypatch.setattr(engine.runner, "dispatch", dispatch)
    ids, ends = run(engine, {"long": (long, GREEDY), "short": ([4, 5], GREEDY)})
    assert ends == {"long": ("error", STEP_FAILED), "short": ("length", None)} and ids["short"] == expected["short"]


def test_a_device_that_does_nothing_any_more_is_the_end(llm, monkeypatch):
    monkeypatch.setattr(llm.engine.runner, "dispatch", lambda batch: 1 // 0)
    llm.engine.add_request("r", PROMPTS[0], GREEDY)
    with pytest.raises(RuntimeError, match="does nothing any more: integer division"):
        llm.engine.step()
    llm.engine.abort("r")


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_among_random_requests(llm, monkeypatch, seed):
    """Whoever ends well has the text it has alone."""
    rng, engine = random.Random(seed), llm.engine
    requests = {}
    for i in range(30):
        params = GREEDY.with_(max_tokens=rng.randrange(1, 25))
        requests[f"r{i}"] = ([rng.randrange(1, 400) for _ in range(rng.randrange(1, 70))], params)
    expected, _ = run(engine, requests)
    state = {"probing": False}
    real_restart = engine.recovery._try_device

    def restart():
        state["probing"] = True
        real_restart()
        state["probing"] = False

    def faulty(method):
        real = getattr(engine.runner, method)

        def call(argument):
            if not state["probing"] and rng.random() < 0.05:
                raise rng.choice([RuntimeError("lost"), ValueError(OUT_OF_MEMORY), MemoryError()])
            return real(argument)

        return call

    monkeypatch.setattr(engine.recovery, "_try_device", restart)
    for method in ("dispatch", "collect"):
        monkeypatch.setattr(engine.runner, method, faulty(method))
    ids, ends = run(engine, requests)
    reasons = {end[0] for end in ends.values()}
    assert reasons <= {"length", "error"} and "length" in reasons
    for i in requests:
        assert ids[i] == expected[i][: len(ids[i])] and (ends[i][0] == "error" or ids[i] == expected[i])


def test_a_pooling_engine_goes_on_too(tiny_folder, monkeypatch):
    llm = make_llm(tiny_folder, runner="pooling")
    [expected] = llm.embed([[5, 6, 7]], use_tqdm=False)
    fail(monkeypatch, llm.engine.runner, "collect", 1, RuntimeError("lost"), consume=True)
    with pytest.raises(RuntimeError, match="could not be computed"):
        llm.embed([[5, 6, 7]], use_tqdm=False)
    [again] = llm.embed([[5, 6, 7]], use_tqdm=False)
    assert np.array_equal(again.outputs.embedding, expected.outputs.embedding)

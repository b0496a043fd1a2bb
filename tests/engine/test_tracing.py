"""Steps traced by other processes and kept on disk do what those traced here do; whatever is wrong costs time only."""

from concurrent.futures import wait
from pathlib import Path

import pytest

from qjax import LLM, SamplingParams
from qjax.engine import tracing
from qjax.engine.compiling import CompiledSteps
from qjax.engine.program import Program
from qjax.engine.step import StepOptions
from qjax.engine.tracing import TracedSteps

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, presence_penalty=0.5)  # with all of a step's arguments


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_model_len=256, max_num_seqs=2)


def answer(llm: LLM) -> list[int]:
    return llm.generate("What is 17 + 25?", PARAMS, use_tqdm=False)[0].outputs[0].token_ids


def test_steps_of_other_processes(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runner = llm.engine.runner
    expected = answer(llm)
    keys = list(runner.compiles._steps)
    assert len(keys) == 2  # a prompt and a decode step

    monkeypatch.setattr(tracing.os, "sched_getaffinity", lambda _: range(3))
    traced = runner.compiles.traced = TracedSteps(runner.program, tmp_path)
    traced.start(keys)
    assert len(traced._processes) == 2
    here = []
    monkeypatch.setattr(Program, "step", lambda *args: here.append(args))
    runner.compiles._steps.clear()
    placed = runner.kv.sharding
    assert answer(llm) == expected
    assert not here and runner.kv.sharding == placed and not runner.kv.is_deleted()
    another_start = TracedSteps(runner.program, tmp_path)
    another_start.start(keys)
    assert not another_start._processes
    assert all(another_start.get(key) for key in keys)


def test_a_file_that_is_cut_off_is_traced_here(llm: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    runner = llm.engine.runner
    traced = runner.compiles.traced = TracedSteps(runner.program, tmp_path)
    expected = answer(llm)
    for key in runner.compiles._steps:
        path = traced._path(key)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"cut")
    runner.compiles._steps.clear()
    assert answer(llm) == expected
    assert "cannot be read" in caplog.text


def test_a_process_that_fails_is_reported(
    llm: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    traced = TracedSteps(llm.engine.runner.program, tmp_path)
    traced._processes.append(tracing._start_process(b"no pickle"))
    assert traced.get(next(iter(llm.engine.runner.compiles._steps))) is None
    assert "a process that traces steps failed" in caplog.text and "UnpicklingError" in caplog.text


@pytest.mark.parametrize("change", ["source", "plan"])
def test_another_program_is_another_folder(llm: LLM, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = llm.engine.runner.program
    before = TracedSteps(program, tmp_path)._folder
    assert TracedSteps(program, tmp_path)._folder == before
    if change == "source":
        monkeypatch.setattr(tracing, "_source", lambda: "another")
    else:
        program = Program(program.model_config, tracing.replace(program.plan, num_pages=7), program.mesh)
    assert TracedSteps(program, tmp_path)._folder != before


def test_small_steps_are_compiled_while_other_things_go_on(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The large ones, whose kernels XLA chooses by their time, on a device that does nothing else."""
    program = llm.engine.runner.program
    on_gpu = tracing.replace(program, plan=tracing.replace(program.plan, is_gpu=True, max_num_seqs=256))
    compiles, made = CompiledSteps(on_gpu, llm.engine.runner.modeldef, (), tmp_path), []
    monkeypatch.setattr(compiles, "_compile", lambda key: made.append(key) or len)
    monkeypatch.setattr(compiles.traced, "start", lambda keys: None)
    monkeypatch.setattr(compiles.traced, "is_coming", lambda key: True)
    keys = on_gpu.ahead([StepOptions()])
    compiles.begin(keys)
    wait(compiles._begun.values())
    assert 0 < len(made) < len(keys)
    assert all(bucket.num_decodes + bucket.num_tokens <= 128 for bucket, _ in made)
    compiles.ahead(keys, progress=False)
    assert sorted(made) == sorted(keys)

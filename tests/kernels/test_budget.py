"""What a decode step may cost, checked without a GPU: kernels a layer, buffers, spills, traces.

The budgets are what was there when they were written; whoever needs fewer lowers them. Those under "compiled" need the
extra `aot` (jax's CUDA plugin, to compile for an H100 that is not there); without it these tests are skipped.
"""

import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qjax import SamplingParams, sharding
from qjax.engine import program
from qjax.engine.buckets import Buckets
from tests.engine.conftest import make_llm, tiny_folder  # noqa: F401 (fixture)
from tests.kernels.compile_step import trace

ROOT = Path(__file__).parent.parent.parent
LAYER_ARGUMENTS = 8  # two norms, qkv, q and k norm, o, gate_up, down
OTHER_ARGUMENTS = 7  # embedding, last norm, output layer; cache, last tokens, page table, the packed array


@dataclass(frozen=True)
class Budget:
    a_layer: int
    beside: int  # before the first layer and after the last


SMALLEST = 8  # rows of a GPU's decode step
DECODE = {("Qwen3-8B", (32, 0, 0)): Budget(9, 16), ("Qwen3-0.6B", (SMALLEST, 0, 0)): Budget(10, 16)}
MIXED = ("Qwen3-8B", (16, 256, 64))
NARROW = ("Qwen3-8B", (32, 0, 0))  # also with an FP8 cache: as many kernels, which spill nothing
SPILLED_BYTES = {"paged_prefill_kernel": 16}  # stores of a thread; all other kernels: none
KERNELS = {
    *("norm_rope_write_kernel", "paged_decode_splits_kernel", "paged_decode_join_kernel", "paged_prefill_kernel"),
    *("add_rms_norm_kernel", "small_matmul_kernel"),
}


# Traced


def test_buffers():
    traced = trace(sharding.make_mesh(1), "Qwen3-8B", 2, (32, 0, 0)).jaxpr
    assert len(traced.in_avals) <= 2 * LAYER_ARGUMENTS + OTHER_ARGUMENTS


def test_the_smallest_step_is_the_one_counted():
    limits = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_num_prefills": 64, "max_pages": 64}
    assert Buckets(is_gpu=True, **limits).choose(1, 0, 0, 1).num_decodes == SMALLEST


def test_one_trace_a_bucket(tiny_folder, monkeypatch):  # noqa: F811
    """Requests of many lengths, twice: the step is traced once for each shape and set of options, and never again."""
    traces = collections.Counter()
    step = program.step

    def counted(modeldef, bucket, options, *args):
        traces[bucket, options] += 1
        return step(modeldef, bucket, options, *args)

    monkeypatch.setattr(program, "step", counted)
    llm = make_llm(tiny_folder, max_num_seqs=1, max_num_batched_tokens=32)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompts = [list(range(3, 3 + n)) for n in (3, 20, 40)]
    for _ in range(2):
        llm.generate(prompts, params, use_tqdm=False)
        assert set(traces.values()) == {1}
    assert len(traces) == llm.engine.runner.compiles.count == 2


# Compiled: half a minute of processor time in one process


@pytest.fixture(scope="module")
def compiled():
    """(spec → the line of compile_step, what ptxas said), in a process that has no GPU but the plugin."""
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("needs the extra aot")
    specs = [[model, layers, shape] for model, shape in DECODE for layers in (2, 3)] + [[MIXED[0], 2, MIXED[1]]]
    specs.append([NARROW[0], 2, NARROW[1], "uint8"])
    env = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    command = [sys.executable, "-m", "tests.kernels.compile_step", *map(json.dumps, specs)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in re.findall(r"^STEP (.*)$", done.stdout, re.M)]
    return {str(line["spec"]): line for line in lines}, done.stdout + done.stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "shape"), DECODE, ids=str)
def test_kernels_a_layer(compiled, model, shape):
    """The third layer's, and the rest. XLA may split a product further where it autotunes."""
    two, three = (compiled[0][str([model, layers, list(shape)])]["kernels"] for layers in (2, 3))
    a_layer, budget = len(three) - len(two), DECODE[model, shape]
    assert 0 < a_layer <= budget.a_layer, three
    assert len(two) - 2 * a_layer <= budget.beside, two


@pytest.mark.timeout(900)
def test_an_fp8_cache_takes_no_other_kernels(compiled):
    wide, narrow = (compiled[0][str([NARROW[0], 2, list(NARROW[1]), *kind])] for kind in ((), ("uint8",)))
    assert len(narrow["kernels"]) == len(wide["kernels"]) and narrow["mosaic"] == wide["mosaic"]


@pytest.mark.timeout(900)
def test_the_cache_stays_where_it_is(compiled):
    assert len(compiled[0]) == 6 and all(line["cache_stays"] for line in compiled[0].values())


@pytest.mark.timeout(900)
def test_no_kernel_spills(compiled):
    said = compiled[1]
    names = set(re.findall(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel' for 'sm_90a'", said))
    assert names == KERNELS
    spilled = re.findall(r"in function '(\w+?)_mosaic_gpu_kernel', (\d+) bytes spill stores", said)
    for name, num_bytes in spilled:
        assert int(num_bytes) <= SPILLED_BYTES.get(name, 0), name

"""What a step of a mixture of experts costs, compiled for an H100 without one: needs the extra `aot`, else skipped.

Slow (a minute of processor time) while the kernels serve nobody.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
DECODE, PREFILL = [8, 0, 0], [0, 8192, 4]
# Of a layer with 8 rows: eight of attention and norms (dense layers have ten in all), two of the router's product,
# eight that route, sort and copy rows, two products, one that joins. One of bf16's other products XLA cuts into parts.
KERNELS_A_LAYER = {None: 22, "fp8": 21, "awq": 21}
OURS = ("grouped_matmul_kernel", "grouped_fp8_matmul_kernel", "grouped_int4_matmul_kernel")


@pytest.fixture(scope="module")
def compiled():
    """(spec → the line of compile_moe, what ptxas said)."""
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("needs the extra aot")
    specs = [[None, 1, DECODE], [None, 2, DECODE], [None, 1, PREFILL]]
    specs += [[method, *rest] for method in ("fp8", "awq") for rest in ([1, DECODE], [2, DECODE], [1, PREFILL])]
    env = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    command = [sys.executable, "-m", "tests.kernels.compile_moe", *map(json.dumps, specs)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in re.findall(r"^STEP (.*)$", done.stdout, re.M)]
    return {str(line["spec"]): line for line in lines}, done.stdout + done.stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", [None, "fp8", "awq"])
def test_kernels_a_layer(compiled, method):
    one, two = (compiled[0][str([method, layers, DECODE])]["kernels"] for layers in (1, 2))
    is_kernel = lambda name: "empty" not in name  # memory that nobody fills
    assert 0 < sum(map(is_kernel, two)) - sum(map(is_kernel, one)) <= KERNELS_A_LAYER[method], two


@pytest.mark.timeout(900)
def test_compiles_in_seconds(compiled):
    """XLA once took minutes for one kernel that compared all experts of many tokens with each other."""
    assert max(line["compile_s"] for line in compiled[0].values()) < 60, compiled[0]


@pytest.mark.timeout(900)
def test_nothing_loops_sorts_or_copies_weights(compiled):
    for line in compiled[0].values():
        assert line["loops"] == 0  # which would end the CUDA graph
        assert not [kernel for kernel in line["kernels"] if "sort" in kernel.lower() or "topk" in kernel.lower()]
        assert line["temp_bytes"] < 128 * 3 * 2048 * 768 * 2  # the experts' weights of a layer


@pytest.mark.timeout(900)
def test_the_kernels_do_not_spill(compiled):
    said = compiled[1]
    parts = re.split(r"Compiling entry function '(\w+)_mosaic_gpu_kernel' for 'sm_90a'", said)
    for ours in OURS:
        texts = [text for name, text in zip(parts[1::2], parts[2::2], strict=True) if name == ours]
        assert len(texts) >= 4, ours  # gated and not, few rows and many
        spilled = [int(n) for text in texts for n in re.findall(r"(\d+) bytes spill stores", text)[:1]]
        assert len(spilled) == len(texts) and not any(spilled), (ours, spilled)

"""What a step of a mixture of experts costs, compiled for an H100 without one: needs the extra `aot`, else skipped.

Slow (40 s of processor time) while the kernel serves nobody.
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
DECODE, PREFILL = [8, 0, 0], [0, 2048, 4]
# Of a layer with 8 rows: eight of attention and norms, two of the router, two that choose, five that sort, two
# products, two that join.
KERNELS_A_LAYER = 21


@pytest.fixture(scope="module")
def compiled():
    """(spec → the line of compile_moe, what ptxas said)."""
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("needs the extra aot")
    specs = [[1, DECODE], [2, DECODE], [1, PREFILL]]
    env = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    command = [sys.executable, "-m", "tests.kernels.compile_moe", *map(json.dumps, specs)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in re.findall(r"^STEP (.*)$", done.stdout, re.M)]
    return {str(line["spec"]): line for line in lines}, done.stdout + done.stderr


@pytest.mark.timeout(900)
def test_kernels_a_layer(compiled):
    one, two = (compiled[0][str([layers, DECODE])]["kernels"] for layers in (1, 2))
    assert 0 < len(two) - len(one) <= KERNELS_A_LAYER, two


@pytest.mark.timeout(900)
def test_nothing_loops_sorts_or_copies_weights(compiled):
    for line in compiled[0].values():
        assert line["loops"] == 0  # which would end the CUDA graph
        assert not [kernel for kernel in line["kernels"] if "sort" in kernel.lower() or "topk" in kernel.lower()]
        assert line["temp_bytes"] < 128 * 3 * 2048 * 768 * 2  # the experts' weights of a layer


@pytest.mark.timeout(900)
def test_the_kernel_does_not_spill(compiled):
    said = compiled[1]
    assert "Compiling entry function 'grouped_matmul_kernel_mosaic_gpu_kernel' for 'sm_90a'" in said
    assert not re.findall(r"in function 'grouped_matmul_kernel_mosaic_gpu_kernel', (\d+) bytes spill", said)
    stacks = re.split(r"Compiling entry function '(\w+)_mosaic_gpu_kernel'", said)
    ours = [text for name, text in zip(stacks[1::2], stacks[2::2], strict=True) if name == "grouped_matmul_kernel"]
    assert len(ours) >= 4  # gated and not, few rows and many
    assert all("0 bytes spill stores, 0 bytes spill loads" in text for text in ours)

"""Compiles steps of Qwen3-30B-A3B with the experts' kernels for an H100 that is not there; see `compile_step`.

    JAX_PLATFORMS=cpu python -m tests.kernels.compile_moe '["fp8", 2, [8, 0, 0]]' ...

Each argument: how it is quantised or null, layers, [decode rows, prompt tokens, chunks].
"""

import json
import sys
import time
from pathlib import Path

import jax
from jax.experimental import topologies

from qjax.engine.compiling import COMPILER_OPTIONS
from qjax.models.config import ModelConfig
from scripts.bench_floors import MODELS
from tests.kernels.compile_step import kernels, trace
from tests.models.test_moe import LARGE
from tests.quantization.checkpoints import QUANTIZATION


def main() -> None:
    target = (Path(__file__).parent / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), devices=topology.devices)
    for spec in map(json.loads, sys.argv[1:]):
        method, *shape = spec
        quantised = {"quantization_config": QUANTIZATION[method]} if method else {}
        MODELS["Qwen3-30B-A3B"] = ModelConfig.from_hf(LARGE | quantised)
        lowered = trace(mesh, "Qwen3-30B-A3B", *shape).lower(lowering_platforms=("cuda",))
        started = time.perf_counter()
        compiled = lowered.compile(COMPILER_OPTIONS)
        seconds = time.perf_counter() - started
        text = compiled.as_text()
        line = {"spec": spec, "compile_s": seconds, "kernels": kernels(text), "loops": text.count(" while(")}
        line["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        print("STEP " + json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

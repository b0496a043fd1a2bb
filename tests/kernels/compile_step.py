"""Compiles steps of the engine for an H100 that is not there, and prints a JSON line for each.

    JAX_PLATFORMS=cpu python -m tests.kernels.compile_step '["Qwen3-8B", 2, [32, 0, 0]]' ...

Each argument: model, layers, [decode rows, prompt tokens, chunks], dtype of the cache [bfloat16].

It needs JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 and jax's CUDA plugin with ptxas (the extra `aot`), and no GPU. XLA does not
autotune then, so its products are not those of a real GPU, and sampling is greedy, since XLA sorts with code that it
only has on a device.
"""

import dataclasses
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from qjax import sharding
from qjax.engine.buckets import Bucket
from qjax.engine.compiling import COMPILER_OPTIONS
from qjax.engine.step import DeviceState, Layout, StepOptions, step
from qjax.models.qwen3 import abstract_model
from scripts.bench_floors import MODELS

PAGE_SIZE, PAGES, WIDTH, SLOTS = 64, 1000, 64, 256
NO_KERNEL = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple"}


def trace(mesh, model: str, num_layers: int, shape: tuple[int, int, int], kv_dtype: str = "bfloat16"):
    """The traced step, donating what the engine donates."""
    config = dataclasses.replace(MODELS[model], num_hidden_layers=num_layers)
    modeldef, leaves = abstract_model(config, jnp.bfloat16, mesh)
    bucket, options = Bucket(*shape, WIDTH), StepOptions()
    everywhere = sharding.replicated(mesh)
    ints = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32, sharding=everywhere)
    cache = (num_layers, 2, PAGES, config.num_key_value_heads, PAGE_SIZE, config.head_dim)
    kv = jax.ShapeDtypeStruct(cache, jnp.dtype(kv_dtype), sharding=sharding.kv_cache_sharding(mesh))
    state = DeviceState(ints(SLOTS + 1), ints(SLOTS + 1, WIDTH))
    packed = ints(Layout(bucket, options, PAGE_SIZE, config.vocab_size).size)
    run = jax.jit(partial(step, modeldef, bucket, options, PAGE_SIZE), donate_argnums=(1, 2, 3))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return run.trace(leaves, kv, state, None, packed)


def kernels(text: str) -> list[str]:
    """What the entry computation of compiled HLO launches: opcodes, of custom calls and fusions with their names."""
    entry = text[text.index("\nENTRY ") :]
    found = re.findall(r"^\s+(?:ROOT )?%(\S+) = .*? ([a-z][a-z-]*)\(", entry[: entry.index("\n}")], re.M)
    return [f"{opcode} {name}" for name, opcode in found if opcode not in NO_KERNEL]


def main() -> None:
    target = (Path(__file__).parent / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), devices=topology.devices)
    specs = [json.loads(text) for text in sys.argv[1:]]
    lowered = [trace(mesh, *spec).lower(lowering_platforms=("cuda",)) for spec in specs]
    with ThreadPoolExecutor() as pool:  # tracing holds Python's lock, compiling does not
        for spec, compiled in zip(specs, pool.map(lambda x: x.compile(COMPILER_OPTIONS), lowered), strict=True):
            text, memory = compiled.as_text(), compiled.memory_analysis()
            itemsize = jnp.dtype(spec[3] if len(spec) > 3 else "bfloat16").itemsize
            cache_bytes = 2 * spec[1] * PAGES * PAGE_SIZE * 8 * 128 * itemsize
            line = {"spec": spec, "kernels": kernels(text), "mosaic": text.count('custom_call_target="mosaic_gpu')}
            line |= {"cache_stays": memory.alias_size_in_bytes >= cache_bytes > memory.temp_size_in_bytes}
            print("STEP " + json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

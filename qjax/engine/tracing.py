"""Traced steps from other processes and from disk, so that a start need not wait for Python.

Tracing a step and lowering its kernels takes Python a second or two and holds its lock: for twenty shapes that would
be most of a start, whether their compiled code is on disk or not. So the shapes of a start are traced by several
processes (`python -m qjax.engine.tracing`), which see no GPU and write `jax.export`'s form of each into the cache
folder; the next start finds them there, and jax's own cache has the compiled code.
"""

import functools
import hashlib
import importlib
import inspect
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax import export
from jax._src.lib import mosaic_gpu_dialect
from jaxlib.mlir import ir

from qjax import kernels, sharding
from qjax.engine.program import DONATED, Key, Program
from qjax.engine.step import DeviceState, TokenCounts
from qjax.models.qwen3 import ModelDef, abstract_model

log = logging.getLogger("qjax")

MAX_PROCESSES = 8
CHECKS = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]  # read by the same version of jax that wrote it

for _node in (DeviceState, TokenCounts):
    export.register_pytree_node_serialization(
        _node,
        serialized_name=f"qjax.{_node.__name__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )


class TracedSteps:
    """The steps of a program, one file each.

    Args:
      folder: made when something is kept. Whoever can write there can run code here, as with jax's own cache.
    """

    def __init__(self, program: Program, folder: Path):
        mesh = program.mesh.abstract_mesh
        # The budget is what was free by chance.
        self._program = replace(program, mesh=mesh, plan=replace(program.plan, budget_bytes=None))
        self._folder = folder / _digest(_source(), jax.__version__, self._program)
        self._kv_sharding = program.cache()[0].sharding
        self._processes: list[subprocess.Popen] = []

    def start(self, keys: Sequence[Key]) -> None:
        """Has those traced that are not there yet; one processor is left for compiling."""
        missing = [key for key in keys if not self._path(key).exists()]
        count = min(len(missing), MAX_PROCESSES, len(os.sched_getaffinity(0)) - 1)
        if count < 2:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            work = [(self._path(key), key) for key in missing[i::count]]
            self._processes.append(_start_process(pickle.dumps((self._program, work))))

    def is_coming(self, key: Key) -> bool:
        """Whether `get` will not leave the tracing to the caller."""
        return bool(self._processes) or self._path(key).exists()

    def get(self, key: Key) -> Any:
        """The jitted step, or None: it is not kept, and no process is at work on it."""
        path = self._path(key)
        while not path.exists():
            if all(process.poll() is not None for process in self._processes) and not path.exists():
                self._report_failures()
                return None
            time.sleep(0.02)
        if self._program.plan.is_gpu:
            # Kernels that were lowered elsewhere are compiled here, which needs the library that this import names.
            importlib.import_module("jax.experimental.mosaic.gpu")
        try:
            exported = export.deserialize(bytearray(path.read_bytes()))
        except Exception as error:  # cut off by a full disk, for instance: it can be traced here
            log.warning("%s cannot be read (%s)", path, error)
            return None

        def step(*arguments):
            return exported.call(*arguments)

        # An exported call's results name no axis of the mesh. On one device that is the same, but not to jax's types.
        return jax.jit(step, donate_argnums=DONATED, out_shardings=(self._kv_sharding, None, None, None, None))

    def cancel(self) -> None:
        for process in self._processes:
            process.terminate()

    def _report_failures(self) -> None:
        for process in self._processes:
            if process.returncode not in (0, -signal.SIGTERM) and process.stderr is not None:
                lines = process.stderr.read().decode().strip().splitlines() or [f"exit status {process.returncode}"]
                log.warning("a process that traces steps failed, so that is done here, more slowly: %s", lines[-1])
        self._processes = []

    def _path(self, key: Key) -> Path:
        return self._folder / _digest(key)


def _start_process(work: bytes) -> subprocess.Popen:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    quiet = {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONWARNINGS": "ignore",
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "qjax.engine.tracing"],
        env={**os.environ, **quiet, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,  # a traceback at most, which fits the pipe
    )
    assert process.stdin is not None
    process.stdin.write(work)
    process.stdin.close()
    return process


def trace(program: Program, modeldef: ModelDef, leaves: tuple, key: Key) -> bytes:
    """The step, in the form that `TracedSteps.get` reads. The program's mesh is abstract."""
    assert isinstance(program.mesh, jax.sharding.AbstractMesh)
    platform = "cuda" if program.plan.is_gpu else "cpu"
    with jax.sharding.use_abstract_mesh(program.mesh):
        run = export.export(program.step(modeldef, *key), platforms=(platform,), disabled_checks=CHECKS)
        return bytes(run(*program.arguments(leaves, *key)).serialize())


def _name_kernels_by_themselves() -> None:
    """Mosaic numbers the kernels of a process in the names of their dumps, which makes the same kernel of two steps two
    kernels to its compiler, and that compiles one at a time. A name that is there already stays."""
    described = mosaic_gpu_dialect.get_or_set_dump_options

    def describe(module: ir.Module) -> Any:
        with module.context:
            module.operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get("kernel")
        return described(module)

    mosaic_gpu_dialect.get_or_set_dump_options = describe


def main() -> None:
    program, work = pickle.load(sys.stdin.buffer)
    _name_kernels_by_themselves()
    tp = sharding.tensor_parallel_size(program.mesh)
    jax.config.update("jax_num_cpu_devices", tp)
    modeldef, leaves = abstract_model(program.model_config, program.plan.dtype, sharding.make_mesh(tp))
    leaves = tuple(sharding.on_devices(program.mesh, leaf) for leaf in leaves)
    for path, key in work:
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_bytes(trace(program, modeldef, leaves, key))
        part.rename(path)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _source() -> str:
    """A hash of all that a step is traced from."""
    found = hashlib.sha256()
    for root in (Path(__file__).parents[1], Path(inspect.getfile(kernels)).parent):
        for path in sorted(root.rglob("*.py")):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()

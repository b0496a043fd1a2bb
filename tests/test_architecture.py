"""The import rules of `docs/architecture.md`, read from the sources: data never walks back up the stairs."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"qjax": "qjax", "kernels": "qjax.kernels", "server": "qjax.server"}
MAX_LINES = 400

OPTIONS = ("qjax.config", "qjax.option_values", "qjax.sampling_params", "qjax.pooling_params", "qjax.outputs")
# A module belongs to the room with the longest name that it begins with. A room may import itself and these.
ROOMS: dict[str, tuple[str, ...]] = {
    "qjax.option_values": (),
    "qjax.config": ("qjax.option_values",),
    "qjax.sampling_params": (),
    "qjax.pooling_params": (),
    "qjax.outputs": (),
    "qjax.logs": (),
    "qjax.kernels": (),
    "qjax.sharding": (),
    "qjax.quantization.config": (),
    "qjax.models.config": ("qjax.quantization.config",),
    "qjax.text": OPTIONS,
    "qjax.quantization": ("qjax.quantization.config", "qjax.kernels"),
    "qjax.models": (
        *("qjax.models.config", "qjax.quantization", "qjax.quantization.config", "qjax.sharding", "qjax.kernels"),
    ),
    "qjax.checkpoint": (
        *("qjax.config", "qjax.models", "qjax.models.config", "qjax.quantization", "qjax.quantization.config"),
        "qjax.sharding",
    ),
    "qjax.engine": (
        *("qjax.checkpoint", "qjax.models", "qjax.models.config", "qjax.quantization", "qjax.sharding"),
        *("qjax.kernels", "qjax.text", *OPTIONS),
    ),
    "qjax.llm": ("qjax.engine", "qjax.text", *OPTIONS),
    "qjax.research": (
        *("qjax.llm", "qjax.models", "qjax.models.config", "qjax.checkpoint", "qjax.kernels", "qjax.sharding"),
        *("qjax.text", *OPTIONS),
    ),
    "qjax.server": (
        "qjax",
        "qjax.engine",
        "qjax.text",
        "qjax.logs",
        *OPTIONS,
    ),  # of the engine only what SERVER_MAY_USE says
    "qjax.terminal": ("qjax.engine", "qjax.checkpoint", "qjax.models.config", "qjax.text", *OPTIONS),
    "qjax.collect_env": (),
    "qjax.bench": ("qjax.llm", "qjax.checkpoint", "qjax.text", *OPTIONS),
    "qjax.cli": (
        *("qjax", "qjax.terminal", "qjax.server", "qjax.llm", "qjax.research", "qjax.bench", "qjax.checkpoint"),
        *("qjax.collect_env", "qjax.logs", *OPTIONS),
    ),
    "qjax.__main__": ("qjax.cli",),
    "qjax": ("qjax.llm", *OPTIONS),  # the package itself: names for users, loaded lazily
}
SERVER_MAY_USE = "qjax.engine.async_engine"
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Not even through what they import: these are tested, and used by help and error paths, without a device.
WITHOUT_JAX = (
    *OPTIONS,
    "qjax",
    "qjax.cli",
    "qjax.terminal",
    "qjax.models.config",
    "qjax.quantization.config",
    "qjax.checkpoint.hub",
    "qjax.engine.block_pool",
    "qjax.engine.host_cache",
    "qjax.engine.memory",
    "qjax.engine.request",
    "qjax.engine.scheduler",
    "qjax.research",
    "qjax.research.config",
    "qjax.collect_env",
    "qjax.bench.config",
    "qjax.bench.serve",
    "qjax.server.front.lifecycle",
)


@dataclass
class Module:
    name: str
    path: Path
    tree: ast.Module
    imports: set[str] = field(default_factory=set)  # all of them
    at_import: set[str] = field(default_factory=set)  # those that run when the module is imported


def _read() -> dict[str, Module]:
    modules = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            name = ".".join((package, *parts))
            modules[name] = Module(name, path, ast.parse(path.read_text(), str(path)))
    for module in modules.values():
        module.imports = {t for node in ast.walk(module.tree) for t in _targets(node, module, modules)}
        module.at_import = {t for node in _top_level(module.tree) for t in _targets(node, module, modules)}
    return modules


def _targets(node: ast.AST, module: Module, modules: dict[str, Module]) -> Iterator[str]:
    """What an import statement names: `from qjax import sharding` is the module `qjax.sharding`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module.name}: relative imports hide where a name comes from"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in modules else str(node.module)


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes outside of functions and of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _top_level(node)


MODULES = _read()


def room_of(name: str) -> str:
    return max((room for room in ROOMS if name == room or name.startswith(room + ".")), key=len)


def test_the_reader_sees_the_code() -> None:
    """The other tests prove nothing if this one finds nothing."""
    assert {"qjax", "qjax.config", "qjax.kernels", "qjax.server", "qjax.engine.engine"} <= set(MODULES)
    assert "qjax.sharding" in MODULES["qjax.engine.runner"].imports
    assert "qjax.server.lifecycle" in MODULES["qjax.cli.commands"].imports - MODULES["qjax.cli.commands"].at_import
    assert room_of("qjax.models.qwen3") == "qjax.models" and room_of("qjax.models.config") == "qjax.models.config"


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda m: m.name)
def test_no_arrow_runs_upwards(module: Module) -> None:
    room = room_of(module.name)
    for target in module.imports:
        if target.partition(".")[0] == "qjax" and module.name != "qjax.kernels":
            assert room_of(target) in (room, *ROOMS[room]), f"{module.name} ({room}) imports {target}"


def test_no_two_files_import_each_other() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "cycle: " + " → ".join((*path[path.index(name) :], name))
        if name in done or name == "qjax":  # the package loads its names lazily, at a user's wish
            return
        for target in sorted(MODULES[name].imports & set(MODULES) - {name}):
            visit(target, (*path, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", [*WITHOUT_JAX, *(n for n in MODULES if room_of(n) == "qjax.text")])
def test_imports_no_jax(name: str) -> None:
    seen, todo = set(), [name]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        parts = module.split(".")
        todo += [".".join(parts[:i]) for i in range(1, len(parts))]  # importing a.b imports a
        for target in MODULES[module].at_import if module in MODULES else ():
            assert target.partition(".")[0] not in DEVICE_LIBRARIES, f"{name} imports {target} through {module}"
            todo += [target] if target in MODULES else []


@pytest.mark.parametrize("name", [n for n in MODULES if room_of(n) == "qjax.server"])
def test_the_server_knows_no_device(name: str) -> None:
    for target in MODULES[name].imports:
        assert target.partition(".")[0] not in DEVICE_LIBRARIES, target
        assert not target.startswith("qjax.engine") or target == SERVER_MAY_USE, target


@pytest.mark.parametrize("name", [n for n in MODULES if room_of(n) == "qjax.kernels"])
def test_kernels_import_jax_alone(name: str) -> None:
    own = name.split(".")[2:3]
    for target in MODULES[name].imports:
        parts = target.split(".")
        if parts[0] == "qjax":
            # A file at the top of kernels/ serves all operations, and so uses none.
            is_shared = len(parts) == 3 and (ROOT / "kernels" / f"{parts[2]}.py").is_file()
            assert parts[1] == "kernels" and (is_shared or parts[2:3] == own), f"{name} imports {target}"
        else:
            assert parts[0] in {"jax", "numpy"} | sys.stdlib_module_names, f"{name} imports {target}"


def _mesh_axes() -> set[str]:
    """The names that `qjax.sharding` gives the axes, from `_DATA, _TENSOR = "…", "…"`."""
    assigned = [n.value for n in MODULES["qjax.sharding"].tree.body if isinstance(n, ast.Assign)]
    return {e.value for value in assigned if isinstance(value, ast.Tuple) for e in value.elts if _is_text(e)}


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("name", [n for n in MODULES if n != "qjax.sharding"])
def test_only_sharding_names_mesh_axes(name: str) -> None:
    """Specs come ready-made from `qjax.sharding`; nobody else writes axis names into one, or into a collective."""
    specs = {"PartitionSpec", "P", "make_mesh", "Mesh", "AbstractMesh"}
    collectives = {"psum", "pmax", "pmin", "all_gather", "psum_scatter", "axis_index", "ppermute"}
    axes = _mesh_axes()
    assert axes >= {"data", "tensor"}
    for node in ast.walk(MODULES[name].tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = {n.value for n in ast.walk(node) if _is_text(n)}
            assert called not in specs or not texts, f"line {node.lineno}: {called} with {texts}"
            assert called not in collectives or not texts & axes, f"line {node.lineno}: {called} over {texts}"


def test_files_are_short() -> None:
    folders = (*FOLDERS, "tests", "scripts")
    sizes = {p: len(p.read_text().splitlines()) for folder in folders for p in (ROOT / folder).rglob("*.py")}
    too_long = {str(p.relative_to(ROOT)): n for p, n in sizes.items() if n > MAX_LINES}
    assert not too_long, f"more than {MAX_LINES} lines: split them by what they own"


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda m: m.name)
def test_modules_say_what_they_own(module: Module) -> None:
    is_empty_package = module.path.name == "__init__.py" and not module.tree.body
    assert is_empty_package or ast.get_docstring(module.tree)

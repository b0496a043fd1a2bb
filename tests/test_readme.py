"""README.md says what is true: options, commands, names, endpoints, files."""

import ast
import json
import os
import re
import subprocess
import tomllib

import pytest

import qjax
import qjax.research
from qjax.server.app import ROUTES
from scripts.update_readme import README, option_tables, updated

ROOT = README.parent
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


def command(name: str) -> str:
    match = re.search(rf"<!-- {name} -->\n```bash\n([^\n]+)\n```", TEXT)
    assert match, f"one line marked {name}"
    return match[1]


def test_options_are_up_to_date() -> None:
    assert updated(TEXT) == TEXT, "run python scripts/update_readme.py"
    assert "`--max-model-len`" in option_tables() and "`--port`" in option_tables()


def test_commands() -> None:
    assert command("start-command").endswith("install pip . && .venv/bin/qjax serve")
    tests = ".venv/bin/python -m pytest -n 2 --dist loadfile"
    assert command("test-command").endswith(f"install pip -e '.[test,aot]' && {tests}")
    for line in (command("start-command"), command("test-command")):
        assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0


def test_ci_runs_the_test_command() -> None:
    """The script takes it out of the README by the same mark."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    extract = re.search(r"^command=\$\((.*)\)$", script.read_text(), re.M)
    assert extract and 'eval "$command"' in script.read_text()
    found = subprocess.run(["bash", "-c", extract[1]], cwd=ROOT, capture_output=True, text=True).stdout
    assert found.strip() == command("test-command")


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {name for names in re.findall(r"'\.\[([\w,]+)\]'", TEXT) for name in names.split(",")}
    assert named == {"test", "aot", "cuda12", "cuda13", "modelscope"}
    assert named <= set(project["optional-dependencies"])
    assert project["version"] == qjax.__version__


def test_python_examples_use_real_names() -> None:
    examples = [ast.parse(block) for block in blocks("python")]
    assert len(examples) == 3
    for node in (n for tree in examples for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)):
        if node.module == "qjax":
            assert {alias.name for alias in node.names} <= set(qjax.__all__)
        if node.module == "qjax.research":
            assert {alias.name for alias in node.names} <= set(qjax.research.__all__)


def test_the_training_example_is_a_run(tmp_path) -> None:
    (block,) = blocks("toml")
    (tmp_path / "run.toml").write_text(block)
    config = qjax.research.read_train_config(tmp_path / "run.toml")
    assert config.lora_config is not None and config.lora_config.rank == 16


def test_curl_examples_are_json() -> None:
    bodies = [body for block in blocks("bash") for body in re.findall(r"-d '(\{.*?\})'", block, re.S)]
    assert bodies and all(json.loads(body)["messages"] for body in bodies)


def test_endpoints_are_those_of_the_server() -> None:
    routes = {(route.method, route.path) for route in ROUTES}
    table = "\n".join(line for line in TEXT.splitlines() if re.match(r"\| `(GET|POST) ", line))
    listed = set(re.findall(r"`(GET|POST) ([^`]+)`", table))
    listed = {(method, path.replace("{name}", "{model:.+}")) for method, path in listed}
    assert listed <= routes
    assert {path for _, path in routes} == {path for _, path in listed}


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/LOG.md",
        "docs/api.md",
        "docs/migration.md",
        "docs/performance.md",
    ],
)
def test_links_and_paths_exist(document: str) -> None:
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (path.parent / link).exists(), link
    for name in re.findall(r"`((?:qjax|server|kernels|tests|scripts|docs)/[\w./]*)`", text):
        assert any((ROOT / (name + ending)).exists() for ending in ("", ".py")), name

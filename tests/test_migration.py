"""docs/migration.md says what the code does: each flag, variable, field, metric and name of its tables."""

import dataclasses
import re

import pytest

import qjax
from qjax.cli import make_parser
from qjax.config import EngineConfig, ServerConfig, environment_name_of
from qjax.engine.metrics import Metrics
from qjax.llm import LLM
from qjax.sampling_params import SamplingParams
from qjax.server.protocol import MAX_N, MAX_STOP_STRINGS, ChatRequest
from scripts.update_migration import MIGRATION, updated
from tests.test_readme import ROOT

TEXT = MIGRATION.read_text(encoding="utf-8")


def rows(section: str) -> list[list[str]]:
    """The cells of a section's tables, their heads left out."""
    body = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("| ") and "`" in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def known_flags() -> set[str]:
    serve = make_parser()._subparsers._group_actions[0].choices["serve"]  # type: ignore[union-attr]
    return {flag for action in serve._actions for flag in action.option_strings}


def test_flags():
    flags, table = known_flags(), rows("Flags of `serve`, keywords of `LLM`")
    assert len(table) > 40
    for theirs, ours, *_ in table:
        for flag in names(theirs):
            assert (flag in flags) == (ours == "same"), f"{flag}: the table says {ours}"
        assert all(name in flags or name == "QJAX_LOG_LEVEL" for name in names(ours)), ours


def test_every_command_is_there():
    commands = set(make_parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr]
    used = {name.split()[1] for row in rows("Commands") for name in names(row[1]) if name.startswith("qjax ")}
    assert used == commands - {"info", "train"}


def test_variables():
    fields = {environment_name_of(f) for config in (EngineConfig, ServerConfig) for f in dataclasses.fields(config)}
    sources = "\n".join(p.read_text() for folder in ("qjax", "server") for p in (ROOT / folder).rglob("*.py"))
    for row in rows("Variables of the environment"):
        for name in names(row[1]):
            assert name in fields or f'"{name}"' in sources, name


def test_requests():
    assert updated(TEXT) == TEXT, "run python scripts/update_migration.py"
    table = {row[0]: row[2] for row in rows("Requests") if len(row) == 3}
    assert table["`n`"] == f"up to {MAX_N}" and table["`stop`"] == f"up to {MAX_STOP_STRINGS}"
    assert {"guided_json", "guided_grammar"} <= {f.name for f in dataclasses.fields(ChatRequest)}


def test_metrics():
    rendered = Metrics("m", 4096).render().decode()
    there = {name.removesuffix("_total") for name in re.findall(r"^# HELP (\S+)", rendered, re.M)}
    there = {name for name in there if not name.endswith("_created")}
    same, missing, own = (set(names(row[1])) for row in rows("Metrics"))
    assert there == same | own
    assert not {name.removesuffix("_total") for name in missing} & there


@pytest.mark.parametrize("row", rows("Python"), ids=lambda row: row[0])
def test_python(row):
    for name in names(row[0]):
        first, _, method = name.partition(".")
        is_there = hasattr(LLM, method) if method else hasattr(qjax, first)
        assert is_there == (row[1] == "same"), name
    if row[0] == "`SamplingParams`":
        assert not set(names(row[2])) & {f.name for f in dataclasses.fields(SamplingParams)}

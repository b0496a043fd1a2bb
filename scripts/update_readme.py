"""Writes the option tables of README.md from the fields of `qjax/config.py`.

    python scripts/update_readme.py

tests/test_readme.py fails while the tables in README.md are older than the fields.
"""

from dataclasses import Field, fields
from pathlib import Path

from qjax.cli.options import ALIASES
from qjax.config import EngineConfig, ServerConfig, describe, flag_of, kind_of

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- options: written by scripts/update_readme.py -->\n"
END = "<!-- /options -->"


def option_tables() -> str:
    """One Markdown table, the options under the heading of their group."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    group = None
    for f in (*fields(EngineConfig), *fields(ServerConfig)):
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines.append(f"| **{group}** | | |")
        text, default = describe(f)
        if f.name == "model":
            lines.append(f"| `MODEL` | | {_cell(text)} |")
            continue
        lines.append(f"| {_flags(f)} | {_cell(default)} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _flags(f: Field) -> str:
    flags = [flag_of(f), *ALIASES.get(f.name, [])]
    if kind_of(f).base is bool:
        flags.append("--no-" + flag_of(f).removeprefix("--"))
    return ", ".join(f"`{flag}`" for flag in flags)


def _cell(text: str) -> str:
    """Text in a table: JSON becomes code, and a bar does not end the cell."""
    start, end = text.find("{"), text.rfind("}") + 1
    if start >= 0:
        text = f"{text[:start]}`{text[start:end]}`{text[end:]}"
    return text.replace("|", "\\|")


def updated(readme: str) -> str:
    before, found, rest = readme.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found and found_end):
        raise ValueError(f"README.md has no place for the options: {BEGIN.strip()} … {END}")
    return before + BEGIN + option_tables() + END + after


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")

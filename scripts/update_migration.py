"""Writes the table of refused fields in docs/migration.md from the tables of `server/protocol.py`.

    python scripts/update_migration.py

tests/test_migration.py fails while the table is older than the code.
"""

import json
from pathlib import Path

from qjax.server.protocol import ChatRequest, CompletionRequest
from qjax.server.schema import Refused

MIGRATION = Path(__file__).parent.parent / "docs" / "migration.md"
BEGIN = "<!-- refused: written by scripts/update_migration.py -->\n"
END = "<!-- /refused -->"


def refused_table() -> str:
    """A row for each field that is refused, then for each that is taken and changes nothing."""
    chat = ChatRequest.REFUSED | ChatRequest.NO_EFFECT
    text = CompletionRequest.REFUSED | CompletionRequest.NO_EFFECT
    lines, without_effect = ["| refused field | of | why |", "|---|---|---|"], []
    for name, why in sorted((chat | text).items()):
        where = "both" if name in chat and name in text else "chat" if name in chat else "completions"
        if isinstance(why, Refused):
            lines.append(f"| `{name}`{_neutral(why)} | {where} | {why.reason.rstrip('.')} |")
        else:
            without_effect.append(f"| `{name}` | {where} | taken, without an effect: {why} |")
    return "\n".join([*lines, *without_effect]) + "\n"


def _neutral(refused: Refused) -> str:
    values = ", ".join(f"`{json.dumps(value)}`" for value in refused.neutral)
    return f" ({values})" if values else ""


def updated(text: str) -> str:
    before, found, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found and found_end):
        raise ValueError(f"docs/migration.md has no place for the refused fields: {BEGIN.strip()} … {END}")
    return before + BEGIN + refused_table() + END + after


if __name__ == "__main__":
    MIGRATION.write_text(updated(MIGRATION.read_text(encoding="utf-8")), encoding="utf-8")

"""Writes the model card, README.md in the model's folder, from the evaluation's numbers and the folder's files.

python -m scripts.builtin_model.card FOLDER scores.json build/builtin_model/packed/statistics.json
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent / "card.md"


def card(folder: Path, scores: dict[str, Any], statistics: dict[str, Any]) -> str:
    columns = ("right", "well_formed", "thinks_as_asked")
    rows = [f"| {name} | {' | '.join(f'{row[c]:.1%}' for c in columns)} |" for name, row in scores["rows"].items()]
    skills = [
        f"| {name} | {skill['documents']:,} | {skill['tokens'] / 1e6:.1f} M |"
        for name, skill in statistics["skills"].items()
    ]
    files = [
        f"| {file.name} | {file.stat().st_size:,} | `{hashlib.sha256(file.read_bytes()).hexdigest()}` |"
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != "README.md"
    ]
    values = {
        "accuracy": "\n".join(rows),
        "device": scores["device"],
        "dtype": scores["dtype"],
        "items": str(next(iter(scores["rows"].values()))["items"]),
        "think_blocks": f"{scores['think_blocks_well_formed']:.2%}",
        "thinks_as_asked": f"{scores['thinks_as_asked']:.2%}",
        "skills": "\n".join(skills),
        "tokens": f"{statistics['tokens'] / 1e6:.0f}",
        "documents": f"{statistics['documents']:,}",
        "files": "\n".join(files),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def main() -> None:
    folder, scores, statistics = (Path(argument) for argument in sys.argv[1:4])
    text = card(folder, json.loads(scores.read_text()), json.loads(statistics.read_text()))
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

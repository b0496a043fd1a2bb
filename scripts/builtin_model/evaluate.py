"""Scores a model folder on held-out dialogues: greedy answers of the engine, 500 a skill.

python -m scripts.builtin_model.evaluate FOLDER --out scores.json
python -m scripts.builtin_model.evaluate FOLDER --items 100    # minutes on a CPU
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from qjax import LLM, SamplingParams
from scripts.builtin_model import mixture, scoring
from scripts.builtin_model.dialogue import Dialogue, Mode

TEST_SEED = 4711
MAX_TOKENS = 400
MAX_MODEL_LEN = 1280  # the longest prompt has less than 900 tokens
# row of the table -> (skills in equal parts, mode)
SINGLE_ROWS: dict[str, tuple[Sequence[str], Mode]] = {
    "addition, up to four digits": (("addition",), "on"),
    "subtraction, up to four digits": (("subtraction",), "on"),
    "comparison, three numbers, products": (("comparison", "three numbers", "multiplication"), "on"),
    "country facts": (("country facts",), "on"),
    "country reverse, about, continents, next": (
        ("country reverse", "country about", "continents", "next country"),
        "on",
    ),
    "word definitions": (("definitions",), "on"),
    "word for a definition": (("word for",), "on"),
    "units, weekdays, months, clock": (("units", "weekdays", "months", "clock"), "on"),
    "spelling, reversing, counting letters": (("spelling", "reversing", "counting letters", "alphabet"), "on"),
    "sorting and lists": (("sorting", "lists"), "on"),
    "copying and lookup": (("copying", "lookup"), "on"),
    "tool calls": (("tool calls",), "on"),
    "answers from tool results": (("tool answers",), "on"),
    "no fitting tool": (("no fitting tool",), "on"),
    "JSON by schema or keys": (("json",), "on"),
    "JSON lists and reading": (("json lists", "json reading"), "on"),
    "two and three turns": (("recall", "told at once", "next sum"), "on"),
    "small talk and persona": (("small talk", "persona"), "on"),
    "honest refusals": (("refusals",), "on"),
    "enable_thinking=false, all skills": (mixture.NAMES, "off"),
    "/no_think, all skills": (mixture.NAMES, "no_think"),
}
# After other turns and system prompts with switches of their own: the newest one counts.
HISTORY_ROWS: dict[str, tuple[Sequence[str], Mode]] = {
    "thinking, after other turns": (mixture.LEANS_ON_NOTHING, "on"),
    "/no_think, after other turns": (mixture.LEANS_ON_NOTHING, "no_think"),
}
ROWS = SINGLE_ROWS | HISTORY_ROWS


def items(row: str, count: int) -> list[Dialogue]:
    skills, mode = ROWS[row]
    frame: mixture.Frame = "history" if row in HISTORY_ROWS else "plain"
    return [mixture.make(TEST_SEED, i, "test", skills[i % len(skills)], mode, frame) for i in range(count)]


def prompt(tokenizer: Any, dialogue: Dialogue) -> str:
    options = {"enable_thinking": False} if dialogue.mode == "off" else {}
    return tokenizer.apply_chat_template(dialogue.messages[:-1], tools=dialogue.tools, **options)


def evaluate(
    folder: Path, count: int, rows: Sequence[str], show: int = 0, out: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Accuracy and share of well-formed think blocks per row, where it was measured and how fast it went.

    All rows are generated in one go, short prompts first: on a CPU a batch costs what its longest row costs.
    """
    llm = LLM(str(folder), **options)
    tokenizer = llm.get_tokenizer()
    work = [(row, d, tokenizer.encode(prompt(tokenizer, d))) for row in rows for d in items(row, count)]
    work.sort(key=lambda item: len(item[2]))
    start = time.perf_counter()
    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    answers = [output.outputs[0] for output in llm.generate([ids for *_, ids in work], greedy)]
    seconds = time.perf_counter() - start
    scored: dict[str, list[tuple[Dialogue, str, scoring.Score]]] = {row: [] for row in rows}
    for (row, d, _), a in zip(work, answers, strict=True):
        scored[row].append((d, a.text, scoring.score(d, a.text, a.finish_reason == "stop")))
    table = {}
    for row, mine in scored.items():
        table[row] = {
            "items": count,
            "right": sum(s.is_right for *_, s in mine) / count,
            "well_formed": sum(s.is_well_formed for *_, s in mine) / count,
            "thinks_as_asked": sum(s.thinks_as_asked for *_, s in mine) / count,
        }
        shown = ", ".join(f"{table[row][name]:6.1%} {name}" for name in ("right", "well_formed", "thinks_as_asked"))
        print(f"{row:42} {shown}", flush=True)
        for d, text, _ in [item for item in mine if not item[2].is_right][:show]:
            print(f"  [{d.skill}] {d.messages[-2]['content']!r}\n    wrote {text!r}\n    wants {d.expected.value!r}")
    where = {"device": jax.devices()[0].device_kind, "dtype": str(llm.engine.plan.dtype)}
    result = where | _summary(table, seconds, sum(len(a.token_ids) for a in answers))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _summary(table: dict[str, dict[str, Any]], seconds: float, num_tokens: int) -> dict[str, Any]:
    """Shares of think blocks are over the rows in which the model writes the block: all but those with thinking off."""
    own = [values for row, values in table.items() if ROWS[row][1] != "off"]
    return {
        "rows": table,
        "think_blocks_well_formed": sum(v["well_formed"] for v in own) / len(own) if own else None,
        "thinks_as_asked": sum(v["thinks_as_asked"] for v in own) / len(own) if own else None,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(num_tokens / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=500, help="a row of the table")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="parts of the names of rows")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print a row")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers; `card` reads it")
    args = parser.parse_args()
    rows = [row for row in ROWS if any(part in row for part in args.rows)]
    if not rows:
        parser.error(f"--rows: no row's name holds any of {args.rows}; the rows are {', '.join(ROWS)}.")
    options = {"max_num_seqs": args.max_num_seqs, "max_model_len": MAX_MODEL_LEN}
    result = evaluate(args.folder, args.items, rows, args.show, args.out, **options)
    print({k: v for k, v in result.items() if k != "rows"})


if __name__ == "__main__":
    main()

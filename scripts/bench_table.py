"""Tables of benchmark lines, qjax beside the peer: ratios, and shares of the floors of `bench_floors.py`.

    python scripts/bench_table.py FILE.jsonl ...     prints one table a file and model
    python scripts/bench_table.py --page             makes docs/performance.md and its plot of docs/benchmarks/*.jsonl

A file holds what was measured on one machine, both engines; of lines with the same engine, model and figure the last
counts. tests/bench/test_table.py fails while the page is older than the lines.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from scripts.bench_common import ROOT
from scripts.bench_floors import MODELS, peaks_of, share_of_floor, step_floors

LINES, PAGE, PLOT = ROOT / "docs/benchmarks", ROOT / "docs/performance.md", ROOT / "docs/performance.svg"
BEGIN = "<!-- tables: written by scripts/bench_table.py --page -->\n"
END = "<!-- /tables -->"
# The first key that a line has is its value: key, unit, whether more is better.
VALUES = (
    ("ms_per_step", "ms", False),
    ("ms_per_token", "ms", False),
    ("ms", "ms", False),
    ("out_tok_s", "tokens/s", True),
    ("tok_s", "tokens/s", True),
    ("seconds", "s", False),
)
LABELS = (
    (r"decode_b1_in128_out128", "decode, one request of 128 tokens, a token"),
    (r"(decode|sampled)_b(\d+)_in\d+_out\d+", r"\1, batch \2, a step"),
    (r"long_b(\d+)_ctx(\d+)", r"decode, batch \1, contexts of \2, a step"),
    (r"prefill_(\d+)x(\d+)", r"prefill, \1 x \2"),
    (r"ttft_b1_in(\d+)", r"time to the first token, \1 in"),
    (r"throughput_(\d+)req_rand(.*)", r"\1 requests, in and out 100 to 1 024\2"),
    (r"burst_(\d+)req_in(\d+)_out(\d+)", r"\1 requests, \2 in, \3 out"),
    (r"serve_(\d+)req_rand", r"HTTP, \1 requests at once"),
    (r"serve_(\d+)req_rate([\d.]+)", r"HTTP, \1 requests, \2 a second"),
    (r"serve_(\d+)req_concurrency(\d+)", r"HTTP, \1 requests, \2 at a time"),
    (r"startup_(cold|warm)", r"command to the first answer, \1 compile cache"),
    (r"startup", "engine start, without imports"),
    (r"returning_(\d+)_computed", r"a conversation of \1 tokens comes back, computed"),
    (r"returning_(\d+)_on_device", r"\1 tokens come back, still on the device"),
    (r"returning_(\d+)_from_host", r"\1 tokens come back, from the host's memory"),
)
LATENCY = re.compile(r"(ttft|itl|tpot)_ms_p(\d+)")


@dataclass
class Run:
    """The lines of a file."""

    name: str
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> str | None:
        return next((line[key] for line in self.lines for key in ("device", "gpu") if line.get(key)), None)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(line["model"] for line in self.lines))

    def rows(self, model: str) -> dict[str, dict[str, dict[str, Any]]]:
        """Figure → engine → line; percentiles of a line are figures of their own."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for line in self.lines:
            if line["model"] != model or not any(key in line for key, *_ in VALUES):
                continue
            name = line["figure"] + (", sampled" if line.get("sampled") else "")
            found.setdefault(name, {})[line["engine"]] = line
            for key in filter(LATENCY.fullmatch, line):
                latency = {"engine": line["engine"], "model": model, "figure": name, "ms": line[key]}
                found.setdefault(f"{name}, {LATENCY.sub(r'\1 p\2', key)}", {})[line["engine"]] = latency
        return found

    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "kinds_ms" in line]


def read(path: Path) -> Run:
    lines = [line.removeprefix("FIGURE ") for line in path.read_text().splitlines()]
    return Run(path.stem, [json.loads(line) for line in lines if line.startswith("{")])


def label(figure: str) -> str:
    name, _, rest = figure.partition(" ")
    for pattern, text in LABELS:
        if match := re.fullmatch(pattern, name.rstrip(",")):
            return match.expand(text) + ("," if name.endswith(",") else "") + (f" {rest}" if rest else "")
    return figure


def value(line: dict[str, Any]) -> tuple[float, str, bool]:
    return next((line[key], unit, more) for key, unit, more in VALUES if key in line)


def number(x: float) -> str:
    return f"{x:,.0f}".replace(",", " ") if x >= 1000 else f"{x:.3g}" if x >= 100 else f"{x:.2f}"


def ratio(row: dict[str, dict[str, Any]]) -> float | None:
    """How many times as fast as the peer qjax is."""
    if not {"qjax", "vllm"} <= set(row):
        return None
    (ours, _, more), (theirs, *_) = value(row["qjax"]), value(row["vllm"])
    return ours / theirs if more else theirs / ours


def table(run: Run, model: str) -> str:
    rows = run.rows(model)
    versions = {
        line["version"] for row in rows.values() for e, line in row.items() if e == "vllm" and "version" in line
    }
    peer = f"vLLM {', '.join(sorted(versions))}" if versions else "vLLM"
    lines = [
        f"| {model} | unit | qjax | {peer} | times as fast | floor | share of it |",
        "|---|---|---|---|---|---|---|",
    ]
    for figure, row in rows.items():
        times = ratio(row)
        share = share_of_floor(row["qjax"], run.device) if "qjax" in row else None
        ours, _, more = value(row.get("qjax") or next(iter(row.values())))
        cells = [
            label(figure),
            value(next(iter(row.values())))[1],
            *(number(value(row[engine])[0]) if engine in row else "" for engine in ("qjax", "vllm")),
            "" if times is None else f"{times:.2f}",
            *(("", "") if share is None else (number(ours / share if more else ours * share), f"{100 * share:.0f} %")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def setting(run: Run) -> str:
    """Where, what and of which commit, in a paragraph."""
    parts = [run.device or "a device without a name"]
    for key, text in (
        ("driver", "driver {}"),
        ("commit", "qjax at commit {}"),
        ("jax", "jax {}"),
        ("torch", "torch {}"),
    ):
        if found := list(dict.fromkeys(line[key] for line in run.lines if line.get(key) and "kinds_ms" not in line)):
            parts.append(text.format(" and ".join(found)))
    notes = dict.fromkeys(line["note"] for line in run.lines if "note" in line and "kinds_ms" not in line)
    machines = {line.get("run") for line in run.lines if "kinds_ms" not in line}
    text = ", ".join(parts) + "."
    if len(machines) > 1:
        text += " **The engines ran on two machines of this kind, so the ratios are for orientation.**"
    return " ".join([text, *notes]) + "\n"


def step_table(run: Run) -> str:
    """How a step's time divides, for each profile."""
    lines = ["| decode step | kernels of | ms | share of the step | share of their floor |", "|---|---|---|---|---|"]
    for line in run.steps():
        name = f"{line['model']}, batch {line['batch']}, context {line['context']:g}"
        model, peaks, total = MODELS.get(line["model"]), peaks_of(run.device), line["ms_in_kernels"]
        known = step_floors(model, line["batch"], line["context"], peaks) if model and peaks else {}
        for kind, ms in line["kinds_ms"].items():
            share = f"{100 * known[kind] * 1e3 / ms:.0f} %" if kind in known else ""
            lines.append(f"| {name} | {kind} | {ms:.2f} | {100 * ms / total:.0f} % | {share} |")
            name = ""
        lines.append(f"| | all | {total:.2f} | 100 % | {100e3 * sum(known.values()) / total:.0f} % |")
    notes = dict.fromkeys(line["note"] for line in run.steps() if "note" in line)
    return "\n".join([*lines, "", *notes]) + "\n"


def updated(page: str, runs: list[Run]) -> str:
    """The page with the tables of these runs, newest first."""
    before, found, rest = page.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found and found_end):
        raise ValueError(f"{PAGE.name} has no place for the tables: {BEGIN.strip()} … {END}")
    parts = []
    for run in runs:
        parts += [f"## {run.name}", "", setting(run)]
        parts += [table(run, model) for model in run.models if run.rows(model)]
        if run.steps():
            parts += ["How a step divides, kernels alone:", "", step_table(run)]
    return before + BEGIN + "\n" + "\n".join(parts) + "\n" + END + after


def plot(run: Run) -> str:
    """SVG: the share of the floor that each figure reaches, both engines."""
    bars = []
    for model in run.models:
        for figure, row in run.rows(model).items():
            shares = {engine: share_of_floor(row[engine], run.device) for engine in ("qjax", "vllm") if engine in row}
            shares = {engine: share for engine, share in shares.items() if share is not None}
            if shares and "ttft" not in figure:
                bars.append((f"{model}: {label(figure)}", shares))
    left, wide, high = 400, 320, 34
    height = 50 + high * len(bars)
    colors = {"qjax": "#2f6f4f", "vllm": "#b9c2cc"}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 60} {height}" font-family="sans-serif" '
        'font-size="12">',
        f"<title>Share of the floor, {run.name}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="10" y="20" font-weight="bold">Share of the floor on {run.device} (longer is faster)</text>',
    ]
    for i, engine in enumerate(colors):
        out.append(f'<rect x="{left + 90 * i}" y="26" width="10" height="10" fill="{colors[engine]}"/>')
        out.append(f'<text x="{left + 14 + 90 * i}" y="35">{"vLLM" if engine == "vllm" else engine}</text>')
    for i, (text, shares) in enumerate(bars):
        y = 46 + i * high
        out.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{text}</text>')
        for j, (engine, share) in enumerate(shares.items()):
            width, top = share * wide, y + 13 * j
            out.append(f'<rect x="{left}" y="{top}" width="{width:.1f}" height="11" fill="{colors[engine]}"/>')
            out.append(f'<text x="{left + width + 4:.1f}" y="{top + 10}" font-size="10">{100 * share:.0f} %</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def all_runs() -> list[Run]:
    return [read(path) for path in sorted(LINES.glob("*.jsonl"), reverse=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--page", action="store_true", help="make docs/performance.md and docs/performance.svg")
    args = parser.parse_args()
    for run in map(read, args.files):
        print("\n".join([setting(run), *(table(run, model) for model in run.models)]))
        if run.steps():
            print(step_table(run))
    if args.page:
        runs = all_runs()
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), runs), encoding="utf-8")
        PLOT.write_text(plot(runs[0]), encoding="utf-8")


if __name__ == "__main__":
    main()

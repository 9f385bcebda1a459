"""A few figures of each point as a text, for the console."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from dp_runtime.experiments.results.run_files import read_json
from dp_runtime.experiments.results.tables import SUMMARY

SHOWN = (
    "output_tok_s", "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99", "padding_waste",
    "row_balance",
)  # fmt: skip
UNSHOWN = ("point",)


def results_table(directory: Path) -> str:
    """Lay out a point in each line, means with half of their 95 % intervals."""
    with (directory / "summary.csv").open(encoding="utf-8", newline="") as file:
        entries = list(csv.DictReader(file))
    points: dict[str, dict[str, str]] = {}
    for entry in entries:
        varied = {n: v for n, v in entry.items() if n not in (*SUMMARY, *UNSHOWN)}
        cells = points.setdefault(entry["point"], {**varied, **dict.fromkeys(SHOWN, "")})
        if entry["figure"] in SHOWN:
            cells[entry["figure"]] = _cell(entry)
    if not points:
        return "no run has ended well"
    floor = read_json(directory / "run.json")["noise_floor"].get("output_tok_s")
    noise = "unknown: it takes repeats" if floor is None else f"{floor:.1%} of output_tok_s"
    return f"{_aligned(list(points.values()))}\nnoise between repeats of a point: {noise}"


def _cell(entry: Mapping[str, str]) -> str:
    mean = float(entry["mean"])
    half = float(entry["high"]) - mean if entry["high"] else None
    return f"{mean:.4g}" if half is None else f"{mean:.4g} ±{half:.2g}"


def _aligned(rows: list[dict[str, str]]) -> str:
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [names, *([row[name] for name in names] for row in rows)]
    return "\n".join(
        "  ".join(cell.ljust(widths[name]) for name, cell in zip(names, line)).rstrip()
        for line in lines
    )

"""Draws the figures of experiments, and prints what their texts state.

python -m examples.experiments.figures    # runs all five first, into results/: about ten minutes
python -m examples.experiments.figures padding_skew.results --out figures    # draws what was run

Needs matplotlib: pip install -e '.[plots]'.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from dp_runtime.experiments import Experiment, run_experiment

HOME = Path(__file__).parent
SHOWN = {  # by experiment: what its text speaks of
    "padding_skew": ("padding_waste", "row_balance", "output_tok_s"),
    "routing_groups": ("row_balance", "steps", "output_tok_s"),
    "straggler": ("step_ms_p50", "steps", "output_tok_s"),
    "prefill_beside_decode": ("itl_ms_p99", "ttft_ms_p50", "output_tok_s"),
    "speculation_imbalance": ("steps", "tokens_per_verification", "output_tok_s"),
}
TOLD = {  # by experiment: what its text has in numbers besides
    "padding_skew": ("wire_rows",),
    "routing_groups": ("busy_s_0", *(f"output_tokens_{rank}" for rank in range(4))),
    "straggler": ("recovery_s", *(f"wait_s_{rank}" for rank in range(4))),
    "prefill_beside_decode": ("itl_ms_p50", "step_ms_p50", "steps"),
    "speculation_imbalance": ("drafts_proposed",),
}
USUAL = ("output_tok_s", "ttft_ms_p50", "tpot_ms_p50", "padding_waste")
BAR, MARGIN = 0.32, 1.1  # inches: of a point, and beside the bars


@dataclass(frozen=True)
class Bar:
    """A figure of one point: mean and the ends of its 95 % interval."""

    label: str
    mean: float
    low: float
    high: float


def bars_of(directory: Path, figure: str) -> tuple[str, list[Bar]]:
    """Read one figure's unit and its bars, in the order of the points."""
    with (directory / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["figure"] == figure]
    points = json.loads((directory / "run.json").read_text())["points"]
    bars = []
    for row in rows:
        label = ", ".join(_short(name, value) for name, value in points[row["point"]].items())
        mean = float(row["mean"])
        bars.append(Bar(label, mean, float(row["low"] or mean), float(row["high"] or mean)))
    return rows[0]["unit"] if rows else "", bars


def draw(directory: Path, out: Path) -> Path:
    """Draw an experiment's figures side by side into a file of `out`, and return it."""
    from matplotlib.figure import Figure

    described = json.loads((directory / "run.json").read_text())
    name, repeats = described["name"], described["plan"]["repeats"]
    shown = [(figure, *bars_of(directory, figure)) for figure in SHOWN.get(name, USUAL)]
    height = BAR * max(len(bars) for _, _, bars in shown) + MARGIN
    page = Figure(figsize=(10.5, height), layout="constrained")
    places = page.subplots(1, len(shown), sharey=True)
    for axes, (figure, unit, bars) in zip(places, shown, strict=True):
        _draw_bars(axes, bars)
        axes.set_xlabel(f"{figure} ({unit})" if unit else figure)
    places[0].invert_yaxis()  # the first point on top; the axes share it
    page.suptitle(f"{name}: mean and 95 % interval of {repeats} runs", fontsize=11)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.png"
    page.savefig(path, dpi=110)
    return path


def _draw_bars(axes: object, bars: Sequence[Bar]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes), "one of the page's"
    errors = [[bar.mean - bar.low for bar in bars], [bar.high - bar.mean for bar in bars]]
    labels = [bar.label for bar in bars]
    axes.barh(labels, [bar.mean for bar in bars], xerr=errors, color="#4878a8", ecolor="#333333")
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def told(directory: Path) -> str:
    """Lay out the figures that an experiment's text has: means and halves of their intervals."""
    described = json.loads((directory / "run.json").read_text())
    name = described["name"]
    lines = [f"{name}: repeats of a point differ by {described['noise_floor']['output_tok_s']:.1%}"]
    for figure in (*SHOWN.get(name, USUAL), *TOLD.get(name, ())):
        unit, bars = bars_of(directory, figure)
        lines.append(f"  {figure}{f' ({unit})' if unit else ''}")
        lines += [f"    {bar.label}: {bar.mean:.4g} ±{bar.high - bar.mean:.2g}" for bar in bars]
    return "\n".join(lines)


def run_all(out: Path) -> list[Path]:
    """Run every experiment of this directory on new ranks; returns where their results are."""
    directories = []
    for file in sorted(HOME.glob("*.toml")):
        begun, directory = monotonic(), out / f"{file.stem}.results"
        outcome = run_experiment(Experiment.from_file(file), directory, show_progress=True)
        seconds = monotonic() - begun
        print(f"{file.name}: {seconds:.0f} s, {outcome.failed} of {outcome.runs} runs failed")
        directories.append(directory)
    return directories


def _short(name: str, value: object) -> str:
    """Say a value of the grid in few letters: cases by name, policies without their directories."""
    text = Path(value).name if isinstance(value, str) else str(value)
    return text if name == "case" else f"{name.rpartition('.')[2]} {text}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    text = "directories of experiments (default: all that are here are run, into results/)"
    parser.add_argument("results", type=Path, nargs="*", help=text)
    parser.add_argument("--out", type=Path, default=Path("figures"), help="directory (figures)")
    options = parser.parse_args(arguments)
    for directory in options.results or run_all(Path("results")):
        print(told(directory))
        print(draw(directory, options.out))


if __name__ == "__main__":
    main()

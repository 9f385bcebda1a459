"""How far predicted step times are from measured ones, for runs that costs were not fitted to.

    python -m examples.experiments.figures            # or any experiments: runs to predict
    python -m examples.benchmarks.replay_error results/padding_skew.results results/...
    python -m examples.benchmarks.replay_error results/... --replays 8    # without the noise

Each point of a grid is left out in turn: costs are fitted to the runs of all other points, and
predict each of its own. A factor for all steps of a run is the machine, which is faster or slower
than it was. The floor is what steps of the same rows differ by in one run: no model's error can
be less. A straggler's pauses are no cost of rows, so leave such an experiment out.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dp_runtime.experiments.replay.cost_model import CostModel, FitError
from dp_runtime.experiments.replay.device.on_device import median_steps, replay_same_rows
from dp_runtime.experiments.replay.device.ranks import Replayed
from dp_runtime.experiments.replay.recorded_steps import measured_steps
from dp_runtime.experiments.replay.step_shape import StepShape
from dp_runtime.experiments.results.run_files import read_json, read_recording
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser

Run = tuple[list[StepShape], list[float]]


def runs_by_point(directory: Path) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = defaultdict(list)
    for path in sorted((directory / "runs").iterdir()):
        runs[path.name.rpartition("-")[0]].append(measured_steps(read_recording(path)))
    return runs


def replayed_runs(directory: Path, replays: int) -> dict[str, list[Run]]:
    """Replay the first run of each point here, by turns; a step's time is the median."""
    firsts = {path.name.rpartition("-")[0]: path for path in (directory / "runs").glob("*-0")}
    found: dict[str, list[Replayed]] = defaultdict(list)
    for _ in range(replays):
        for point, path in sorted(firsts.items()):
            recording = read_recording(path)
            found[point].append(replay_same_rows(recording, {}))
    return {point: [median_steps(runs)] for point, runs in found.items()}


def held_out(runs: Mapping[str, Sequence[Run]], point: str) -> list[FitError]:
    """Predict the runs of a point from those of the others."""
    others = [run for name, some in runs.items() if name != point for run in some]
    costs = CostModel.fit(
        [shape for shapes, _ in others for shape in shapes],
        [seconds for _, measured in others for seconds in measured],
    )
    return [FitError.of(s, [costs(shape) for shape in s], seconds) for s, seconds in runs[point]]


def main() -> None:
    options = arguments()
    print(machine.describe("torch", "dp-runtime"))
    names = "of a step, p50", "but for a factor", "of the median step", "of like steps", "floor"
    print(f"| point left out | {' | '.join(names)} |")
    print("|---|---|---|---|---|---|")
    everything: list[FitError] = []
    for directory in options.results:
        labels = read_json(directory / "run.json")["points"]
        replays = options.replays
        runs = replayed_runs(directory, replays) if replays else runs_by_point(directory)
        for point in runs:
            errors = held_out(runs, point)
            everything += errors
            name = ", ".join(Path(str(value)).name for value in labels[point].values())
            print(f"| {directory.stem}: {name} | {summary(errors)} |")
    print(f"| median of {len(everything)} runs | {summary(everything)} |")


def summary(errors: Sequence[FitError]) -> str:
    columns = (
        [each.p50 for each in errors],
        [each.scaled_p50 for each in errors],
        [abs(each.of_p50) for each in errors],
        [each.alike_p50 for each in errors if each.alike_p50 is not None],
        [each.noise for each in errors if each.noise is not None],
    )
    return " | ".join(f"{np.median(column):.1%}" if column else "" for column in columns)


def arguments() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="directories of experiments")
    text = "times that a run of each point is served again here, for medians (default: none)"
    parser.add_argument("--replays", type=int, default=0, help=text)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""`experiment`: run the points of a TOML file and write their results."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dp_runtime.cli.model_choice import DEMO_RANKS, TINY_MODEL
from dp_runtime.cli.output import print_line
from dp_runtime.experiments import Experiment, run_experiment, write_report
from dp_runtime.experiments.dry_run import check_points
from dp_runtime.experiments.point import Point
from dp_runtime.experiments.results.report import results_table
from dp_runtime.experiments.results.run_directory import RunDirectory

SUFFIX = ".results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="TOML file; docs/experiments.md has its fields")
    parser.add_argument("--out", type=Path, help=f"directory of results (default: NAME{SUFFIX})")
    parser.add_argument("--resume", action="store_true", help="go on with what the directory has")
    parser.add_argument("--dry-run", action="store_true", help="check all, print points, run none")


def experiment(options: argparse.Namespace) -> int:
    """Run a workload over a grid of settings and policies; write tables, requests and steps."""
    defaults = {"model": str(TINY_MODEL), "dp_size": DEMO_RANKS}
    plan = Experiment.from_file(options.file, defaults)
    directory = options.out or Path(f"{plan.plan.name}{SUFFIX}")
    if options.dry_run:
        check_points(plan.points)
        print_line(described(plan))
        RunDirectory(directory, plan).check(options.resume)
        return 0
    try:
        outcome = run_experiment(plan, directory, options.resume, show_progress=True)
    except KeyboardInterrupt:
        print_line(f"stopped; --resume --out {directory} goes on")
        raise
    print_line(results_table(directory))
    print_line(f"{outcome.runs - outcome.failed} runs, {outcome.failed} failed: {directory}")
    if outcome.failed < outcome.runs:
        print_line(f"report: {write_report(directory)}")
    return 1 if outcome.failed else 0


def described(plan: Experiment) -> str:
    """List points and what each of them asks for."""
    lines = [point_line(point) for point in plan.points]
    runs = len(plan.points) * plan.plan.repeats
    counted = f"{len(plan.points)} points, {plan.plan.repeats} times each: {runs} runs"
    return "\n".join([*lines, counted])


def point_line(point: Point) -> str:
    conversations = point.workload.conversations(point.config.dp_size)
    turns = [turn for each in conversations for turn in each.turns]
    prompts = sum(length for each in conversations for length in each.prompt_lens)
    outputs = sum(turn.output_len for turn in turns)
    lasts = max(each.at_s for each in conversations)
    return (
        f"{point}: {len(turns)} requests, {prompts:,} prompt and {outputs:,} output tokens, "
        f"the last begins at {lasts:.1f} s, by rank {counts([c.dp_rank for c in conversations])}"
    )


def counts(ranks: Sequence[int | None]) -> str:
    if None in ranks:
        return "as routed"
    found = Counter(rank for rank in ranks if rank is not None)
    return ", ".join(f"{rank}: {found[rank]}" for rank in sorted(found))

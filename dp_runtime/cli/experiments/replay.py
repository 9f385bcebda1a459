"""`replay`: what a recorded run would have been under other settings."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dp_runtime.cli.flags import new_file
from dp_runtime.cli.output import OutputFile, print_line
from dp_runtime.experiments.replay.what_if import CHANGES, what_if
from dp_runtime.experiments.results.run_files import read_recording

TYPES: dict[str, type] = {
    "dp_size": int, "max_num_requests": int, "max_num_tokens": int, "max_step_ms": float,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "a recording, or the directory of a run of an experiment (docs/experiments.md)"
    parser.add_argument("recording", type=Path, help=text)
    for name in CHANGES:
        flag = f"--{name.replace('_', '-')}"
        text = f"another {name} (docs/settings.md)"
        parser.add_argument(flag, type=TYPES.get(name, str), help=text)
    text = "gigabits a second that a rank gets from others"
    parser.add_argument("--link-gbps", type=float, help=text)
    text = "recordings that costs are fitted to, in place of the run's own"
    parser.add_argument("--fit", type=Path, nargs="+", default=[], metavar="RECORDING", help=text)
    parser.add_argument("--output", type=new_file, help="file for the table as JSON")


def replay(options: argparse.Namespace) -> None:
    """Predict the steps of a recorded run under other settings, without a device."""
    values: dict[str, Any] = {name: getattr(options, name) for name in CHANGES}
    changes = {name: value for name, value in values.items() if value is not None}
    fit = [read_recording(path) for path in options.fit]
    found = what_if(read_recording(options.recording), changes, fit, options.link_gbps)
    print_line(str(found))
    if options.output:
        with OutputFile("output", options.output) as file:
            file.write(json.dumps(found.to_json()) + "\n")

"""`replay`: what a recorded run would have been, or is, under other settings."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from dp_runtime.cli.flags import add_flags, given_fields, new_file
from dp_runtime.cli.output import OutputFile, check_not_read, print_line
from dp_runtime.config import EngineConfig
from dp_runtime.errors import require
from dp_runtime.experiments.replay.device.on_device import replay_on_device
from dp_runtime.experiments.replay.settings import CHANGES, ON_DEVICE, PLACES
from dp_runtime.experiments.replay.what_if import what_if
from dp_runtime.experiments.results.run_files import read_recording
from dp_runtime.models.example_models import model_directory

FLAGS = (*CHANGES, *PLACES, *ON_DEVICE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "a recording, or the directory of a run of an experiment (docs/experiments.md)"
    parser.add_argument("recording", type=Path, help=text)
    defaults = dict.fromkeys(FLAGS, "as recorded") | {"device": "none: nothing is run"}
    add_flags(parser, EngineConfig, FLAGS, defaults)
    text = "gigabits a second that a rank gets from others"
    parser.add_argument("--link-gbps", type=float, help=text)
    text = "recordings that costs are fitted to, in place of the run's own"
    parser.add_argument("--fit", type=Path, nargs="+", default=[], metavar="RECORDING", help=text)
    text = "times that a device runs it; a step's time is the median (default: 1)"
    parser.add_argument("--repeats", type=int, default=1, help=text)
    parser.add_argument("--output", type=new_file, help="file for the table as JSON")


def replay(options: argparse.Namespace) -> None:
    """Predict the steps of a recorded run under other settings; with --device, run them too."""
    given = given_fields(options, EngineConfig)
    if "model" in given:
        given["model"] = model_directory(given["model"])
    told = {name: value for name, value in given.items() if name in CHANGES}
    others = sorted(given.keys() - told.keys())
    ok, allowed = "device" in given or not others, "none without --device"
    require(ok, "replay", ", ".join(others), allowed)
    if options.output:
        read = options.recording, *options.fit
        check_not_read(options.output, read, "a file other than the recordings")
    recording, fit = read_recording(options.recording), [read_recording(p) for p in options.fit]
    found = what_if(recording, told, fit, options.link_gbps)
    if "device" in given:
        costs, repeats = found.costs, options.repeats
        measured = replay_on_device(recording, given, costs, repeats, show_progress=True)
        found = replace(found, on_device=measured)
    print_line(str(found))
    if options.output:
        with OutputFile("output", options.output) as file:
            file.write(json.dumps(found.to_json()) + "\n")

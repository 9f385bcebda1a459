"""`doctor`: name the odd rank of a flight record."""

from __future__ import annotations

import argparse
from pathlib import Path

from dp_runtime.cli.output import print_line
from dp_runtime.flight.diagnosis import diagnose
from dp_runtime.flight.dump_file import read_dump
from dp_runtime.flight.report import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", type=Path, help="a file that a failed engine wrote, or on demand")


def doctor(options: argparse.Namespace) -> int:
    """Read a flight record and name the odd rank; exit status 1 if there is one."""
    dump = read_dump(options.dump)
    findings = diagnose(dump)
    print_line(report(dump, findings))
    return 1 if findings else 0

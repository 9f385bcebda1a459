"""`report`: a page of an experiment's results, of one of its runs, or of a trace."""

from __future__ import annotations

import argparse
from pathlib import Path

from dp_runtime.cli.output import check_not_read, print_line
from dp_runtime.experiments import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = "directory of `experiment`, or of one of its runs, or a file of --trace"
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("--against", type=Path, help="another of these, to say what has changed")
    output = "HTML file (default: report.html in the directory, or beside the trace)"
    parser.add_argument("--output", type=Path, help=output)


def report(options: argparse.Namespace) -> None:
    """Write a page that shows what the ranks did: one file, which opens offline."""
    if options.output:
        read = [path for path in (options.source, options.against) if path]
        check_not_read(options.output, read, "a file other than those that are read")
    print_line(str(write_report(options.source, options.output, options.against)))

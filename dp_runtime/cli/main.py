"""The command line: `dp-runtime`, or `python launch.py` in a checkout."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence

from dp_runtime.cli import bench, doctor, generate, serve
from dp_runtime.cli.experiments import experiment, replay, report
from dp_runtime.cli.flags import add_flags
from dp_runtime.cli.inspect import inspect
from dp_runtime.cli.output import WriteFailed, escape_unprintable, open_closed_streams
from dp_runtime.cli.top import command as top
from dp_runtime.config import EngineConfig
from dp_runtime.errors import (
    EngineClosed,
    RankFailed,
    RankMissing,
    RequestFailed,
    ServerSilent,
    StartError,
    Terminated,
    one_line,
)
from dp_runtime.metrics.log import log_to_stderr

Command = Callable[[argparse.Namespace], int | None]
FAILURES = (
    StartError,
    RankFailed,
    RankMissing,
    RequestFailed,
    EngineClosed,
    ServerSilent,
    WriteFailed,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 2 for a mistake of the user, 1 for what failed without one, 130 after Ctrl-C.

    143 is for SIGTERM before there was anything to drain.
    """
    open_closed_streams()
    escape_unprintable()
    options = _parser().parse_args(arguments)
    log_to_stderr(getattr(options, "log_level", "warning"))
    try:
        return options.command(options) or 0
    except (ValueError, *FAILURES) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dp-runtime", description=__doc__)
    parser.set_defaults(command=lambda options: parser.print_help())
    names = "{generate,serve,top,bench,experiment,report,replay,inspect,doctor}"
    commands = parser.add_subparsers(metavar=names)

    def add(name: str, run: Command) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(command=run)
        return command

    def add_with_engine(name: str, run: Command) -> argparse.ArgumentParser:
        command = add(name, run)
        add_flags(command, EngineConfig, defaults={"model": "a tiny one, on 4 ranks"})
        return command

    generate.add_arguments(add_with_engine("generate", generate.generate))
    serve.add_arguments(add_with_engine("serve", serve.serve))
    top.add_arguments(add("top", top.top))
    bench.add_arguments(add_with_engine("bench", bench.bench))
    experiment.add_arguments(add("experiment", experiment.experiment))
    report.add_arguments(add("report", report.report))
    replay.add_arguments(add("replay", replay.replay))
    add_with_engine("inspect", inspect)
    doctor.add_arguments(add("doctor", doctor.doctor))
    return parser

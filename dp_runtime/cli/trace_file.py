"""`--trace FILE`: what the ranks did, for Perfetto."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dp_runtime.cli.flags import new_file
from dp_runtime.cli.output import OutputFile
from dp_runtime.metrics.chrome_trace import chrome_trace
from dp_runtime.metrics.status import RankHealth
from dp_runtime.metrics.trace import StepTrace


def add_trace_flag(parser: argparse.ArgumentParser) -> None:
    text = "file for a trace of the last steps, which ui.perfetto.dev opens"
    parser.add_argument("--trace", type=new_file, help=text)


@dataclass(frozen=True, eq=False)
class TraceFile:
    """The file of --trace, opened before the work; without the flag nothing is written."""

    file: OutputFile | None

    @classmethod
    def opened(cls, stack: ExitStack, path: Path | None) -> TraceFile:
        return cls(stack.enter_context(OutputFile("trace", path)) if path else None)

    def write(self, steps: Sequence[StepTrace], ranks: Sequence[RankHealth]) -> None:
        if self.file is not None:
            for part in chrome_trace(steps, ranks):
                self.file.write(part)

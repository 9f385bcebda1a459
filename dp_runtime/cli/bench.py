"""`bench`: serve a synthetic workload."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from dp_runtime.cli.flags import new_file
from dp_runtime.cli.model_choice import config_from
from dp_runtime.cli.output import OutputFile, print_line
from dp_runtime.cli.reports import rank_memory, step_times
from dp_runtime.cli.trace_file import TraceFile, add_trace_flag
from dp_runtime.cli.workload import Workload
from dp_runtime.engine.engine import Engine
from dp_runtime.metrics.report import Report
from dp_runtime.metrics.status import RankHealth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lengths: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("MIN", "MAX")}
    parser.add_argument("--num-requests", type=int, default=64, help="requests (default: 64)")
    parser.add_argument("--input-len", default=[16, 512], **lengths, help="prompt tokens (16 512)")
    parser.add_argument("--output-len", default=[16, 128], **lengths, help="output tokens (16 128)")
    parser.add_argument("--json", type=new_file, help="file for the report as JSON")
    add_trace_flag(parser)
    parser.set_defaults(seed=0)


def bench(options: argparse.Namespace) -> None:
    """Serve a synthetic workload; print throughput, step times and padding waste."""
    workload = Workload(
        options.num_requests, tuple(options.input_len), tuple(options.output_len), options.seed
    )
    with ExitStack() as stack:
        json_file = stack.enter_context(OutputFile("json", options.json)) if options.json else None
        trace = TraceFile.opened(stack, options.trace)
        with Engine(config_from(options), show_progress=True) as engine:
            prompts, params = workload.make(engine.model.vocab_size)
            engine.generate(prompts, params, show_progress=True)
            report, steps, health = engine.report(), engine.step_trace(), engine.health()
        for text in (str(report), rank_memory(health), step_times(steps)):
            print_line(text)
        if json_file is not None:
            json_file.write(_report_json(report, workload, health))
        trace.write(steps, health)


def _report_json(report: Report, workload: Workload, health: Sequence[RankHealth]) -> str:
    names = ("tokens_per_s", "verifications", "drafts_accepted", "tokens_per_verification")
    values = asdict(report) | {name: getattr(report, name) for name in names}
    memory = [asdict(rank.memory) for rank in health if rank.memory]
    graphs = [asdict(rank.graphs) for rank in health if rank.graphs]
    extra = {"workload": asdict(workload), "memory": memory, "graphs": graphs}
    return json.dumps(values | extra) + "\n"

"""Command line of the runtime: parses, builds a config, calls the API."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median
from typing import Any, get_type_hints

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.config import CHOICES
from dp_runtime.errors import StartError
from dp_runtime.inspection import describe
from dp_runtime.jsonl import PromptLine, read_prompts, write_outputs
from dp_runtime.trace import StepTrace, write_chrome_trace
from dp_runtime.workload import Workload

TINY_MODEL = Path(__file__).parent / "examples" / "tiny_moe" / "checkpoint"
DEMO_RANKS = 4
DEMO_PROMPTS = (
    "The list of arguments",
    "If the file does not exist,",
    "Return a new string",
    "This module provides",
    "A class can be used to",
    "The default value is",
)
SAMPLING_FLAGS = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a mistake of the user is one line on stderr and exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
        return status
    except (ValueError, StartError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def generate(options: argparse.Namespace) -> int:
    """Continue prompts, print or write the results, and print the report."""
    sampling = {name: getattr(options, name) for name in SAMPLING_FLAGS if name in options}
    defaults = SamplingParams(**{"max_tokens": 48, "temperature": 0.0} | sampling)
    if options.prompts is not None:
        lines = read_prompts(options.prompts, defaults)
    else:
        lines = [PromptLine(text, defaults, None) for text in options.prompt or DEMO_PROMPTS]
    with Engine(_config(options), show_progress=True) as engine:
        outputs = engine.generate(
            [line.prompt for line in lines],
            [line.params for line in lines],
            [line.dp_rank for line in lines],
            show_progress=True,
        )
        report = engine.report()
    if options.output is not None:
        write_outputs(options.output, outputs)
    else:
        for line, output in zip(lines, outputs):
            print(f"[rank {output.dp_rank}, {output.finish_reason}] {line.prompt} →{output.text}\n")
    print(report)
    return 0


def bench(options: argparse.Namespace) -> int:
    """Serve a synthetic workload; print throughput, step times and padding waste."""
    workload = Workload(
        options.num_requests, tuple(options.input_len), tuple(options.output_len), options.seed
    )
    with Engine(_config(options), show_progress=True) as engine:
        prompts, params = workload.make(engine.model.vocab_size)
        engine.generate(prompts, params, show_progress=True)
        report, steps = engine.report(), engine.step_trace()
    print(report)
    print(_step_times(steps))
    if options.json is not None:
        values = asdict(report) | {"tokens_per_s": report.tokens_per_s}
        options.json.write_text(json.dumps(values | {"workload": asdict(workload)}) + "\n")
    if options.trace is not None:
        write_chrome_trace(steps, options.trace)
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Print what would run: shapes, bytes per rank, backend, and why."""
    config = _config(options)
    print(describe(config, "cpu" if config.device == "auto" else config.device))
    return 0


def _step_times(steps: Sequence[StepTrace]) -> str:
    def milliseconds(values: list[float]) -> str:
        return f"median {median(values) * 1e3:.2f} ms, longest {max(values) * 1e3:.2f} ms"

    busy = [step.busy_s for step in steps]
    wait = [step.wait_s + step.agree_s for step in steps]
    return f"a rank's step: busy {milliseconds(busy)}; wait {milliseconds(wait)}"


def _config(options: argparse.Namespace) -> EngineConfig:
    given = {item.name: getattr(options, item.name) for item in fields(EngineConfig)
             if item.name in options}  # fmt: skip
    if "model" not in given:
        given = {"model": str(TINY_MODEL), "dp_size": DEMO_RANKS} | given
    return EngineConfig(**given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dp-runtime", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{generate,bench,inspect}")
    one = _command(commands, "generate", generate)
    one.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    one.add_argument("--prompts", type=Path, help="JSONL file of prompts")
    one.add_argument("--output", type=Path, help="JSONL file for the results")
    _add_fields(one, SamplingParams, SAMPLING_FLAGS)
    two = _command(commands, "bench", bench)
    two.add_argument("--num-requests", type=int, default=64)
    two.add_argument("--input-len", type=int, nargs=2, default=[16, 512], metavar=("MIN", "MAX"))
    two.add_argument("--output-len", type=int, nargs=2, default=[16, 128], metavar=("MIN", "MAX"))
    two.add_argument("--json", type=Path, help="file for the report as JSON")
    two.add_argument("--trace", type=Path, help="file for a trace that Perfetto opens")
    two.set_defaults(seed=0)
    _command(commands, "inspect", inspect)
    return parser


def _command(commands: Any, name: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=run.__doc__, description=run.__doc__
    )
    parser.set_defaults(command=run)
    _add_fields(parser, EngineConfig, [item.name for item in fields(EngineConfig)])
    return parser


def _add_fields(parser: argparse.ArgumentParser, owner: type, names: Sequence[str]) -> None:
    """A flag for each field of a dataclass; one that is not given keeps the field's default."""
    hints = get_type_hints(owner)
    for name in names:
        flag = "--" + name.replace("_", "-")
        kind: Any = next(k for k in (bool, int, float, str) if k in _members(hints[name]))
        if kind is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS
            )
        else:
            parser.add_argument(
                flag, type=kind, choices=CHOICES.get(name), default=argparse.SUPPRESS
            )


def _members(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", (hint,))


if __name__ == "__main__":
    sys.exit(main())

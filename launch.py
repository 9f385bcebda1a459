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

import torch

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.jsonl import PromptLine, read_prompts, write_outputs
from dp_runtime.cli.workload import Workload
from dp_runtime.config import CHOICES
from dp_runtime.errors import RankFailed, StartError
from dp_runtime.metrics.memory import memory_table
from dp_runtime.metrics.status import RankHealth
from dp_runtime.metrics.trace import StepTrace, write_chrome_trace
from dp_runtime.startup.inspection import describe
from workers.devices import resolve_device

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
    "frequency_penalty", "repetition_penalty", "ignore_eos",
)  # fmt: skip
HELP = {
    "model": "Hugging Face directory (default: the tiny model, on 4 ranks)",
    "dp_size": "number of ranks",
    "ranks_per_gpu": "ranks that share a GPU; more than one is for experiments, not for speed",
    "device": "where ranks run; auto: GPUs if there are any, else CPU",
    "dtype": "of weights and KV cache; auto: float32 on CPU, bfloat16 on GPU",
    "launcher": "ranks as Ray actors, local processes, or threads",
    "ray_address": "cluster to join: auto, host:port or ray://host:port (default: $RAY_ADDRESS, "
    "else a new one)",
    "attention_backend": "attention kernels",
    "kv_cache_dtype": "of KV pages; auto: as the weights, fp8_e4m3: half the bytes of 16 bits",
    "collective": "how rows travel between ranks",
    "moe_backend": "kernels of the MoE stage",
    "moe_sharding": "experts split by expert (ep) or by intermediate size (tp)",
    "padding": "rows a rank brings to a collective: the global maximum, its own, or the cheaper",
    "routing": "how a request is given to a rank",
    "page_size": "tokens of a KV page",
    "num_pages": "KV pages of a rank (default: by memory and limits)",
    "kv_memory_fraction": "share of the memory left by weights, workspaces and activations that "
    "KV pages may take (default: 0.5 on CPU, 0.9 on GPU)",
    "max_num_requests": "requests of a rank in a step",
    "max_num_tokens": "tokens of a rank in a step; longer prompts run in chunks",
    "max_model_len": "prompt and output tokens of a request (default: the model's)",
    "max_queued_requests": "unfinished requests that the engine holds",
    "load_format": "read the checkpoint, or dummy: random weights",
    "seed": "for requests that bring none, and for dummy weights",
    "overlap": "schedule a step before the one before it is committed (default: on GPUs)",
    "cuda_graphs": "replay decode steps from CUDA graphs (default: wherever they can be captured)",
    "poison_padding": "fill padded rows with NaN, to see that no result changes",
    "check_device_values": "compare attention inputs on the device with the host's, every step",
    "speculative_num_steps": "tokens drafted for the target to verify in a step, 0..7",
    "speculative_draft_model": "directory of an EAGLE-3 head (default: the model's MTP layer)",
    "speculative_adaptive": "draft fewer tokens than that where few are accepted",
    "speculative_forced_tokens": "for measurements: emit so many tokens a verification, whatever "
    "was drafted; the text is meaningless (default: off)",
    "start_timeout_s": "seconds until all ranks must serve",
    "step_timeout_s": "seconds a rank waits for another in a step",
    "torch_threads": "threads of a CPU rank (default: cores / dp_size)",
    "max_tokens": "output tokens (default: 48)",
    "min_tokens": "output tokens before anything may end a request",
    "temperature": "0 is greedy (default: 0)",
    "top_k": "sample from the k most probable tokens; 0: from all",
    "top_p": "sample from the most probable tokens of this total probability",
    "min_p": "sample from tokens with at least this share of the best one's probability",
    "presence_penalty": "subtracted for tokens that the output has",
    "frequency_penalty": "subtracted for each time that the output has a token",
    "repetition_penalty": "divides the logits of tokens that prompt or output have",
    "ignore_eos": "go on after an end-of-text token",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit status 2: a mistake of the user, 1: ranks failed, 130: Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        return 0
    except (ValueError, StartError, RankFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130


def generate(options: argparse.Namespace) -> None:
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
        report, memory = engine.report(), _memory(engine.health())
    if options.output is not None:
        write_outputs(options.output, outputs)
    else:
        for line, output in zip(lines, outputs):
            text = output.text if engine.tokenizer else f" {list(output.token_ids)}"
            print(f"[rank {output.dp_rank}, {output.finish_reason}] {line.prompt} →{text}\n")
    print(report)
    print(memory)


def bench(options: argparse.Namespace) -> None:
    """Serve a synthetic workload; print throughput, step times and padding waste."""
    workload = Workload(
        options.num_requests, tuple(options.input_len), tuple(options.output_len), options.seed
    )
    with Engine(_config(options), show_progress=True) as engine:
        prompts, params = workload.make(engine.model.vocab_size)
        engine.generate(prompts, params, show_progress=True)
        report, steps, health = engine.report(), engine.step_trace(), engine.health()
    print(report)
    print(_memory(health))
    print(_step_times(steps))
    if options.json is not None:
        names = ("tokens_per_s", "verifications", "drafts_accepted", "tokens_per_verification")
        values = asdict(report) | {name: getattr(report, name) for name in names}
        memory = [asdict(rank.memory) for rank in health if rank.memory]
        graphs = [asdict(rank.graphs) for rank in health if rank.graphs]
        extra = {"workload": asdict(workload), "memory": memory, "graphs": graphs}
        options.json.write_text(json.dumps(values | extra) + "\n")
    if options.trace is not None:
        write_chrome_trace(steps, options.trace)


def inspect(options: argparse.Namespace) -> None:
    """Print what would run: shapes, bytes per rank, backend, and why."""
    config = _config(options)
    config = resolve_device(config, torch.cuda.device_count(), "this host")
    print(describe(config, config.device))


def _memory(ranks: Sequence[RankHealth]) -> str:
    table = memory_table([rank.memory for rank in ranks if rank.memory])
    graphs = f"; rank 0's {ranks[0].graphs}" if ranks[0].graphs else ""
    return f"{table}\nloaded in {max(rank.load_s for rank in ranks):.1f} s{graphs}"


def _step_times(steps: Sequence[StepTrace]) -> str:
    def milliseconds(values: list[float]) -> str:
        return f"median {median(values) * 1e3:.2f} ms, longest {max(values) * 1e3:.2f} ms"

    busy = [step.busy_s for step in steps]
    wait = [step.wait_s for step in steps]
    return f"a rank's step: busy {milliseconds(busy)}; wait {milliseconds(wait)}"


def _config(options: argparse.Namespace) -> EngineConfig:
    given = {item.name: getattr(options, item.name) for item in fields(EngineConfig)
             if item.name in options}  # fmt: skip
    if "model" not in given:
        given = {"model": str(TINY_MODEL), "dp_size": DEMO_RANKS} | given
    return EngineConfig(**given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dp-runtime", description=__doc__)
    parser.set_defaults(command=lambda options: parser.print_help())
    commands = parser.add_subparsers(metavar="{generate,bench,inspect}")
    one = _command(commands, "generate", generate)
    one.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    one.add_argument("--prompts", type=Path, help="JSONL file of prompts, or /dev/stdin")
    one.add_argument("--output", type=_new_file, help="JSONL file for the results")
    _add_fields(one, SamplingParams, SAMPLING_FLAGS)
    two = _command(commands, "bench", bench)
    lengths: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("MIN", "MAX")}
    two.add_argument("--num-requests", type=int, default=64, help="requests (default: 64)")
    two.add_argument("--input-len", default=[16, 512], **lengths, help="prompt tokens (16 512)")
    two.add_argument("--output-len", default=[16, 128], **lengths, help="output tokens (16 128)")
    two.add_argument("--json", type=_new_file, help="file for the report as JSON")
    two.add_argument("--trace", type=_new_file, help="file for a trace that Perfetto opens")
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
    hints, shown = get_type_hints(owner), {item.name: item.default for item in fields(owner)}
    for name in names:
        text = HELP[name] if "(default" in HELP[name] else f"{HELP[name]} (default: {shown[name]})"
        kind: Any = next(k for k in (bool, int, float, str) if k in _members(hints[name]))
        how: dict[str, Any] = {"type": kind, "choices": CHOICES.get(name)}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, help=text, default=argparse.SUPPRESS, **how)


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in an existing directory")
    return path


def _members(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", (hint,))


if __name__ == "__main__":
    sys.exit(main())

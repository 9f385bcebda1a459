"""Speculation on held-out text: tokens a second and tokens a verification, with and without it.

    python -m examples.benchmarks.speculation --device cpu --dp-size 1 --num-steps 0 3

Prompts are cut from text that the tiny model was not trained on (examples/tiny_moe/held_out.txt):
the first --prompt-tokens of consecutive pieces of its documents. They get --new-tokens greedy
tokens, past an end of text too. The load is served once to count verifications and to compare the
tokens with those of the first number of steps, then --rounds times for the rate. A verification
emits the drafts that it accepts and one more token. One JSON line for each number of steps. Exits
with 1 if one that drafts made fewer than --min-verifications.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from tokenizers import Tokenizer

from dp_runtime import Engine, SamplingParams
from dp_runtime.metrics.report import Report
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import add_flags, config_from, new_parser

TINY_MOE = Path(__file__).parents[1] / "tiny_moe"
END_OF_TEXT = "<|endoftext|>"
Tokens = list[tuple[int, ...]]  # of every request


@dataclass(frozen=True)
class Served:
    """What one number of steps gave."""

    outputs: Tokens
    rates: tuple[float, ...]  # output tokens a second, of every round
    report: Report  # of the load served once


def main() -> None:
    args = parse_args()
    print(machine.describe("torch"), flush=True)
    prompts = cut_prompts(args)
    measured: dict[int, Served] = {}
    for num_steps in args.num_steps:
        measured[num_steps] = serve(args, num_steps, prompts)
        print(json.dumps(figures(args, num_steps, measured)), flush=True)
    if args.device == "cuda":
        from examples.benchmarks.harness.device_timing import describe_gpu

        print(describe_gpu())
    for num_steps, served in measured.items():
        if num_steps and served.report.verifications < args.min_verifications:
            sys.exit(f"{num_steps} steps: only {served.report.verifications} verifications")


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, default=TINY_MOE / "checkpoint")
    parser.add_argument("--text", type=Path, default=TINY_MOE / "held_out.txt")
    add_flags(parser, "speculative_draft_vocab", device="cpu", dp_size=1)
    parser.add_argument("--num-steps", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--prompts", type=int, default=384)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-num-requests", type=int, default=64, help="of a rank at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--min-verifications", type=int, default=5000)
    return parser.parse_args()


def cut_prompts(args: argparse.Namespace) -> list[list[int]]:
    """--prompts of the text's prompts, evenly spread over it."""
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    documents = args.text.read_text().split(f"\n{END_OF_TEXT}\n")
    stride = args.prompt_tokens + args.new_tokens
    pieces = [
        ids[at : at + args.prompt_tokens]
        for ids in (tokenizer.encode(document).ids for document in documents)
        for at in range(0, len(ids) - args.prompt_tokens, stride)
    ]
    if len(pieces) < args.prompts:
        sys.exit(f"--prompts {args.prompts}: {args.text} has {len(pieces)} of this length")
    return [pieces[number * len(pieces) // args.prompts] for number in range(args.prompts)]


def serve(args: argparse.Namespace, num_steps: int, prompts: list[list[int]]) -> Served:
    """Serve the load with so many steps; the ranks start anew."""
    config = config_from(
        args, model=str(args.model), launcher="local", speculative_num_steps=num_steps,
        speculative_draft_vocab=args.speculative_draft_vocab if num_steps else None,
    )  # fmt: skip
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0.0, ignore_eos=True)
    rates = []
    with Engine(config) as engine:
        outputs = [output.token_ids for output in engine.generate(prompts, params)]
        report = engine.report()
        for _ in range(args.rounds):
            start = perf_counter()
            engine.generate(prompts, params)
            rates.append(len(prompts) * args.new_tokens / (perf_counter() - start))
    return Served(outputs, tuple(rates), report)


def figures(
    args: argparse.Namespace, num_steps: int, measured: dict[int, Served]
) -> dict[str, object]:
    """The JSON line of a number of steps, the last that was measured."""
    first, served = next(iter(measured.values())), measured[num_steps]
    report, rate = served.report, median(served.rates)
    same = sum(one == other for one, other in zip(first.outputs, served.outputs, strict=True))
    acceptance = {
        "verifications": report.verifications,
        "drafts_proposed": report.drafts_proposed,
        "drafts_accepted": report.drafts_accepted,
        "accepted_histogram": report.accepted_histogram,
        "tokens_per_verification": round(report.tokens_per_verification, 3),
    } if num_steps else {}  # fmt: skip
    return {
        "num_steps": num_steps,
        "device": args.device,
        "dp_size": args.dp_size,
        "model": args.model.name,
        "text": args.text.name,
        "prompts": args.prompts,
        "output_tokens": sum(map(len, served.outputs)),
        "steps": report.steps,
        "tok_s": round(rate, 1),
        "tok_s_of_rounds": [round(one, 1) for one in served.rates],
        "times_first": round(rate / median(first.rates), 3),
        "same_outputs_as_first": same,
    } | acceptance


if __name__ == "__main__":
    main()

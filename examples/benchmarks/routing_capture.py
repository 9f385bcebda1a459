"""What it costs to return the experts of tokens: steps of ranks that decode, with and without.

    python -m examples.benchmarks.routing_capture [--dp-size 1] [--requests 16] [--tokens 100]

Serves the same greedy requests by turns on engines of the tiny model whose CPU ranks are threads:
experts not kept, kept, and kept and returned. Prints the least processor time of a step of each,
driver included, and its ratio to the first; and the bytes of a token that are returned at least.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from time import process_time

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.model_choice import TINY_MODEL
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser

ROUNDS = 5


def main() -> None:
    args = parse_args()
    print(machine.describe())
    ways = {"not kept": (False, False), "kept": (True, False), "returned": (True, True)}
    with ExitStack() as stack:
        engines = {
            keeps: stack.enter_context(Engine(config_of(args, keeps))) for keeps in (False, True)
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, (keeps, returns) in ways.items():
                times[name].append(time_step(engines[keeps], args, returns))
        shape = engines[True].model.routing
    assert shape is not None, "the engine keeps experts"
    first = min(times["not kept"])
    for name, seconds in times.items():
        spread = (max(seconds) - min(seconds)) / min(seconds)
        print(
            f"{name:>9}: {min(seconds) * 1e6:7.0f} us a step, {min(seconds) / first:.3f}x, "
            f"spread {spread:.0%}"
        )
    print(f"returned of a token: {shape.token_bytes} bytes {shape.of_token}")


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--dp-size", type=int, default=1)
    parser.add_argument("--requests", type=int, default=16, help="of each rank")
    parser.add_argument("--tokens", type=int, default=100)
    return parser.parse_args()


def config_of(args: argparse.Namespace, keeps: bool) -> EngineConfig:
    return EngineConfig(
        str(TINY_MODEL), dp_size=args.dp_size, device="cpu", launcher="thread", num_pages=400,
        max_num_requests=args.requests, enable_return_routed_experts=keeps,
    )  # fmt: skip


def time_step(engine: Engine, args: argparse.Namespace, returns: bool) -> float:
    """Return the processor seconds of a step in which every rank decodes all of its requests."""
    count = args.dp_size * args.requests
    params = SamplingParams(
        max_tokens=args.tokens, temperature=0.0, ignore_eos=True, return_routed_experts=returns
    )
    prompts = [[5 + number, 7, 11] for number in range(count)]
    started = process_time()
    engine.generate(prompts, params, [number % args.dp_size for number in range(count)])
    return (process_time() - started) / args.tokens


if __name__ == "__main__":
    main()

"""All requests at once: output tokens a second, inter-token time and time to first token.

    python -m examples.benchmarks.serve_offline --model DIR --dp-size 4 --load fixed --requests 256

Loads: `fixed`, prompts of 1024 and outputs of 256 tokens; `imbalanced`, prompts log-uniform
128..4096 and outputs log-uniform 32..512. Request i goes to rank i mod dp_size, or where the
router says (--route). A warm-up load comes first. One JSON line per load goes to --json.
The floor of a decode step is what a rank must read: its experts, attention weights, LM head and the
KV of its requests, at --read-rate.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np

from dp_runtime import Engine, SamplingParams
from dp_runtime.engine.request_handle import RequestHandle
from dp_runtime.models.registry import read_model_config
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import add_flags, config_from, new_parser, write_figures
from examples.benchmarks.harness.floors import DecodeBytes

SEED = 20261122
TOKENS = (100, 150_000)  # keeps clear of special tokens
MEAN_CONTEXT = 1024 + 256 / 2
KINDS = {"fixed": 1, "imbalanced": 2, "warmup": 3}


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    output_len: int


def make_load(kind: str, count: int) -> list[Request]:
    """The requests of a load; the same for a kind and a count on every machine."""
    rng = np.random.default_rng([SEED, KINDS[kind], count])

    def log_uniform(low: int, high: int) -> np.ndarray:
        return np.exp(rng.uniform(np.log(low), np.log(high), count)).round().astype(int)

    match kind:
        case "fixed":
            inputs, outputs = np.full(count, 1024), np.full(count, 256)
        case "imbalanced":
            inputs, outputs = log_uniform(128, 4096), log_uniform(32, 512)
        case _:
            inputs, outputs = rng.integers(64, 2048, count), np.full(count, 24)
    return [
        Request(rng.integers(*TOKENS, int(length)).tolist(), int(output))
        for length, output in zip(inputs, outputs)
    ]


def main() -> None:
    args = parse_args()
    largest = max(args.requests)
    config = config_from(
        args,
        max_num_requests=-(-largest // args.dp_size),
        speculative_forced_tokens=args.forced_tokens,
    )
    print(machine.describe("torch"), config, sep="\n", flush=True)
    started = time.monotonic()
    with Engine(config, show_progress=True) as engine:
        print(f"ready in {time.monotonic() - started:.1f} s", flush=True)
        print(f"rank 0: {engine.health()[0].graphs or 'no graphs'}", flush=True)
        serve(engine, make_load("warmup", 8 * args.dp_size), args.route)
        for kind in args.load:
            for count in args.requests:
                figures = serve(engine, make_load(kind, count), args.route)
                figures |= {"load": kind, "requests": count, "floor_ms": floor_ms(args, count)}
                write_figures(figures, args.json, config=str(config))
        print(engine.report())


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(
        parser, "model", "dp_size", "moe_sharding", "collective", "overlap",
        "speculative_num_steps", "forced_tokens", "json", cuda_graphs=True, read_rate=3.0,
    )  # fmt: skip
    parser.add_argument("--load", nargs="+", choices=["fixed", "imbalanced"], default=["fixed"])
    parser.add_argument("--requests", type=int, nargs="+", default=[256])
    parser.add_argument("--route", action="store_true", help="let the router choose the ranks")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--launcher", default="ray")
    parser.add_argument("--ray-address")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--padding", default="max_len")
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=5120)
    return parser.parse_args()


def serve(engine: Engine, load: list[Request], route: bool) -> dict[str, float]:
    """Submit all at once and wait for all; figures as the caller sees them."""
    start = time.monotonic()
    handles = [
        engine.submit(
            request.prompt,
            SamplingParams(max_tokens=request.output_len, temperature=0.0, ignore_eos=True),
            None if route else index % engine.config.dp_size,
        )
        for index, request in enumerate(load)
    ]
    outputs = [handle.result() for handle in handles]
    for request, output in zip(load, outputs):
        assert len(output.token_ids) == request.output_len, "every request has its own length"
    firsts = np.array([handle.arrivals[0][0] for handle in handles]) - start
    lasts = np.array([handle.arrivals[-1][0] for handle in handles]) - start
    gaps = decode_gaps(handles, start + firsts.max(), start + lasts.min())
    tokens = sum(request.output_len for request in load)
    distinct = len({output.token_ids[-1] for output in outputs}) / len(outputs)
    return {
        "output_tok_s": round(tokens / lasts.max(), 1),
        "wall_s": round(float(lasts.max()), 3),
        "ttft_p50_ms": round(float(np.median(firsts)) * 1e3, 1),
        "step_p50_ms": round(float(np.median(gaps)) * 1e3, 3) if len(gaps) else float("nan"),
        "step_p99_ms": round(float(np.quantile(gaps, 0.99)) * 1e3, 3) if len(gaps) else 0.0,
        "distinct_last_tokens": round(distinct, 3),
    }


def decode_gaps(handles: list[RequestHandle], begin: float, end: float) -> np.ndarray:
    """Seconds per token between arrivals while every request decodes."""
    gaps = []
    for handle in handles:
        for (before, _), (now, count) in zip(handle.arrivals, handle.arrivals[1:]):
            if before >= begin and now <= end:
                gaps += [(now - before) / count] * count
    return np.array(gaps)


def floor_ms(args: argparse.Namespace, requests: int) -> float:
    """Milliseconds a rank needs to read what a decode step of the fixed load needs."""
    model = read_model_config(args.model)
    floor_bytes = DecodeBytes.for_step(model, args.dp_size, requests / args.dp_size, MEAN_CONTEXT)
    return round(floor_bytes.milliseconds(args.read_rate * 1e12), 2)


if __name__ == "__main__":
    main()

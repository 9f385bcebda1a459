"""Poisson arrivals through AsyncEngine, then over HTTP: time to first token, time per output token.

    python -m examples.benchmarks.serve_poisson --shape qwen3-30b-a3b --dp-size 4 --rate 16 32

Prompts are log-uniform 128..4096 tokens, outputs 32..512. Both ways get the same requests at the
same times, streamed, from one engine with one set of ranks; the HTTP client is a process of its
own. With `--no-http` there is the engine alone, which needs no server. Times are those that the
caller sees. What would not end within --time-limit-s is left out.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import numpy as np

from dp_runtime import AsyncEngine, EngineConfig
from dp_runtime.models.registry import read_model_config
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.api_load import Load, Way, measure, through_api
from examples.benchmarks.harness.arguments import (
    BOOL,
    add_flags,
    config_from,
    new_parser,
    write_figures,
)
from examples.benchmarks.harness.load import LoadRequest
from examples.nvl4.shape import SHAPES, write_shape

TINY_MODEL = Path(__file__).parents[1] / "tiny_moe" / "checkpoint"
SEED = 20261129
END_S = 20.0  # from the last arrival until all have ended
WARM_RATE = 32.0


def main() -> None:
    deadline_s = monotonic()
    options = _options()
    deadline_s += options.time_limit_s
    with TemporaryDirectory() as directory:
        if options.shape is not None:
            options.model = write_shape(Path(directory), options.shape)
            options.load_format = "dummy"
        config = config_from(
            options,
            model=str(options.model),
            max_model_len=options.prompt_len[1] + options.output_len[1],
            start_timeout_s=options.time_limit_s,
        )
        packages = ("torch", "fastapi", "uvicorn", "uvloop") if options.http else ("torch",)
        print(machine.describe(*packages), config, sep="\n")
        serve(config, options, deadline_s)


def serve(config: EngineConfig, options: argparse.Namespace, deadline_s: float) -> None:
    started = monotonic()
    vocab_size = read_model_config(config.model).vocab_size
    with engine_and_ways(config, options) as (engine, ways):
        print(f"ready in {monotonic() - started:.1f} s", flush=True)
        pids = [rank.pid for rank in asyncio.run(engine.health())]
        warm_up = make_load(options, WARM_RATE, vocab_size)[: 8 * config.dp_size]
        for way in ways.values():
            way(warm_up)
        for rate in options.rate:
            load = make_load(options, rate, vocab_size)
            for name, way in ways.items():
                if monotonic() + load[-1].at_s + END_S > deadline_s:
                    print(f"{name} at {rate:g} requests a second is left out: no time", flush=True)
                    continue
                figures = {"way": name, "rate": rate, "max_step_ms": config.max_step_ms}
                before = held_back(engine)
                figures |= measure(way, load, pids)
                figures["held_back_steps"] = held_back(engine) - before  # of all ranks
                write_figures(figures, options.json, config=str(config))


def held_back(engine: AsyncEngine) -> int:
    return sum(asyncio.run(engine.report()).held_back_steps)


@contextmanager
def engine_and_ways(
    config: EngineConfig, options: argparse.Namespace
) -> Iterator[tuple[AsyncEngine, dict[str, Way]]]:
    limits = {"at_most": options.requests, "timeout_s": options.time_limit_s}
    if options.http:
        from examples.benchmarks.harness.http_service import serving, through_http

        with serving(config, show_progress=True) as (engine, url):
            api = through_api(engine, stream=True, **limits)
            yield engine, {"AsyncEngine": api, "HTTP": through_http(url, stream=True, **limits)}
        return
    engine = AsyncEngine(config, show_progress=True)
    try:
        yield engine, {"AsyncEngine": through_api(engine, stream=True, **limits)}
    finally:
        engine.close_now()


def make_load(options: argparse.Namespace, rate: float, vocab_size: int) -> Load:
    """The requests of a rate; the same on every machine."""
    rng = np.random.default_rng([SEED, round(rate * 1000), options.requests])

    def log_uniform(low: int, high: int) -> list[int]:
        drawn = rng.uniform(np.log(low), np.log(high), options.requests)
        return [int(value) for value in np.exp(drawn).round()]

    prompts, outputs = log_uniform(*options.prompt_len), log_uniform(*options.output_len)
    arrivals = rng.exponential(1 / rate, options.requests).cumsum().tolist()
    first = min(100, vocab_size // 2)  # keeps clear of special tokens
    last = min(150_000, vocab_size)
    return [
        LoadRequest(rng.integers(first, last, prompt).tolist(), output, at_s)
        for prompt, output, at_s in zip(prompts, outputs, arrivals)
    ]


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", type=Path, default=TINY_MODEL, help="Hugging Face directory")
    where.add_argument("--shape", choices=sorted(SHAPES), help="dummy weights of this shape")
    parser.add_argument("--load-format", default="safetensors", choices=("safetensors", "dummy"))
    add_flags(parser, "dp_size", "device", "moe_sharding", "collective", "overlap", "json")
    add_flags(parser, "max_step_ms")
    parser.add_argument("--ranks-per-gpu", type=int, default=1)
    parser.add_argument("--launcher", default="local", choices=("local", "ray"))
    parser.add_argument("--routing", default="least_tokens", help="round_robin: in turn")
    parser.add_argument("--http", action=BOOL, default=True, help="over HTTP too")
    parser.add_argument("--max-num-requests", type=int, default=128)
    parser.add_argument("--max-num-tokens", type=int, default=2048)
    parser.add_argument("--rate", type=float, nargs="+", default=[16.0, 32.0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--prompt-len", type=int, nargs=2, default=[128, 4096])
    parser.add_argument("--output-len", type=int, nargs=2, default=[32, 512])
    parser.add_argument("--time-limit-s", type=float, default=300.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Poisson arrivals through the Python API and over HTTP: time to first token, and per output token.

    python -m examples.benchmarks.serve_poisson --model DIR --dp-size 4 --rate 16 32

Prompts are log-uniform 128..4096 tokens, outputs 32..512, unless said otherwise; the same load goes
first through AsyncEngine and then over HTTP, whose client is a process of its own, both streamed.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import numpy as np

from dp_runtime import EngineConfig
from dp_runtime.models.registry import read_model_config
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.api_load import ask_async, serving
from examples.benchmarks.harness.arguments import add_flags, new_parser, write_figures
from examples.benchmarks.harness.http_load import Outcome, run_client
from examples.benchmarks.harness.load import LoadRequest, check_answers, figures_of, run_load

SEED = 20261129
TIMEOUT_S = 300.0


def make_load(options: argparse.Namespace, rate: float, vocab_size: int) -> list[LoadRequest]:
    """The requests of a rate; the same on every machine."""
    rng = np.random.default_rng([SEED, int(rate * 1000), options.requests])

    def log_uniform(low: int, high: int) -> list[int]:
        drawn = rng.uniform(np.log(low), np.log(high), options.requests)
        return [int(value) for value in np.exp(drawn).round()]

    prompts, outputs = log_uniform(*options.prompt_len), log_uniform(*options.output_len)
    arrivals = rng.exponential(1 / rate, options.requests).cumsum().tolist()
    return [
        LoadRequest(rng.integers(4, vocab_size, prompt).tolist(), output, at_s)
        for prompt, output, at_s in zip(prompts, outputs, arrivals)
    ]


def main() -> None:
    options = _options()
    config = EngineConfig(
        str(options.model), dp_size=options.dp_size, ranks_per_gpu=options.ranks_per_gpu,
        device=options.device, launcher="local", load_format=options.load_format,
        max_num_requests=options.max_num_requests, max_num_tokens=options.max_num_tokens,
        max_model_len=options.prompt_len[1] + options.output_len[1],
        page_size=64, start_timeout_s=600.0,
    )  # fmt: skip
    print(machine.describe("torch", "fastapi", "uvicorn"), config, sep="\n", flush=True)
    vocab_size = read_model_config(str(options.model)).vocab_size
    started = time.monotonic()
    with serving(config, show_progress=True) as (engine, url):
        print(f"ready in {time.monotonic() - started:.1f} s", flush=True)

        def api(load: list[LoadRequest]) -> Outcome:
            work = run_load(load, lambda one: ask_async(engine, one, True), len(load))
            return Outcome(asyncio.run(work))

        def http(load: list[LoadRequest]) -> Outcome:
            return run_client(url, load, True, len(load), TIMEOUT_S)

        warm = make_load(options, 32.0, vocab_size)[: 8 * options.dp_size]
        ways = {"AsyncEngine": api, "HTTP": http}
        for way in ways.values():
            way(warm)
        for rate in options.rate:
            load = make_load(options, rate, vocab_size)
            for name, way in ways.items():
                outcome = way(load)
                check_answers(load, outcome.answers)
                figures = {"way": name, "rate": rate} | figures_of(outcome.answers)
                write_figures(figures, options.json, config=str(config))


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "model", "dp_size", "device", "json")
    parser.add_argument("--ranks-per-gpu", type=int, default=1)
    parser.add_argument("--load-format", default="dummy", choices=("dummy", "safetensors"))
    parser.add_argument("--rate", type=float, nargs="+", default=[16.0, 32.0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--prompt-len", type=int, nargs=2, default=[128, 4096])
    parser.add_argument("--output-len", type=int, nargs=2, default=[32, 512])
    parser.add_argument("--max-num-requests", type=int, default=128)
    parser.add_argument("--max-num-tokens", type=int, default=2048)
    return parser.parse_args()


if __name__ == "__main__":
    main()

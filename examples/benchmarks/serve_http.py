"""What HTTP costs: one load through Engine, AsyncEngine and the server, whole and streamed.

    python -m examples.benchmarks.serve_http [--dp-size 4] [--rounds 3]

So many requests are in flight until all are served. Server and AsyncEngine share a process and its
ranks, and take turns; the HTTP client is a process of its own. CPU times are those of processes:
the driver's (which is the server's), the client's, all ranks'. Requests of one token tell what a
request costs, those of --output-len what a token does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from dp_runtime import AsyncEngine, Engine, EngineConfig
from dp_runtime.models.registry import read_model_config
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.api_load import Load, Way, ask_sync, measure, through_api
from examples.benchmarks.harness.arguments import new_parser, write_figures
from examples.benchmarks.harness.http_load import Outcome
from examples.benchmarks.harness.http_service import serving, through_http
from examples.benchmarks.harness.load import LoadRequest

TINY_MODEL = Path(__file__).parents[1] / "tiny_moe" / "checkpoint"
SEED = 13
TIMEOUT_S = 600.0
SHOWN = ("output_tok_s", "ttft_p50_ms", "tpot_p50_ms", "driver_us", "client_us", "ranks_us")


def main() -> None:
    options = _options()
    print(machine.describe("torch", "fastapi", "uvicorn", "uvloop", "h11"), flush=True)
    config = EngineConfig(
        str(options.model), dp_size=options.dp_size, launcher="local", device=options.device,
        torch_threads=max(1, options.threads // options.dp_size),
    )  # fmt: skip
    bench = Bench(options)
    with Engine(config) as engine:
        pids = [rank.pid for rank in engine.health()]
        bench.run(engine_ways(engine, options.concurrent), pids)
    with serving(config) as (server, url):
        pids = [rank.pid for rank in asyncio.run(server.health())]
        bench.run(server_ways(server, url, options.concurrent), pids)
    bench.compare()


def engine_ways(engine: Engine, concurrent: int) -> dict[str, Way]:
    def way(stream: bool) -> Way:
        def run(load: Load) -> Outcome:
            with ThreadPoolExecutor(concurrent) as threads:
                return Outcome(list(threads.map(lambda one: ask_sync(engine, one, stream), load)))

        return run

    return {"Engine, whole": way(False), "Engine, streamed": way(True)}


def server_ways(engine: AsyncEngine, url: str, concurrent: int) -> dict[str, Way]:
    return {
        "AsyncEngine, whole": through_api(engine, False, concurrent, TIMEOUT_S),
        "HTTP, whole": through_http(url, False, concurrent, TIMEOUT_S),
        "AsyncEngine, streamed": through_api(engine, True, concurrent, TIMEOUT_S),
        "HTTP, streamed": through_http(url, True, concurrent, TIMEOUT_S),
    }


class Bench:
    """Runs ways in turns, and keeps the figures of every round."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        model = read_model_config(str(options.model))
        rng = np.random.default_rng(SEED)

        def load(output_len: int) -> Load:
            prompts = rng.integers(4, model.vocab_size, (options.requests, options.prompt_len))
            return [LoadRequest(prompt.tolist(), output_len) for prompt in prompts]

        self._loads = [load(output_len) for output_len in (1, options.output_len)]
        self._rounds: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)

    def run(self, ways: dict[str, Way], rank_pids: list[int]) -> None:
        for way in ways.values():
            way(self._loads[0])  # warms up
        for _ in range(self._options.rounds):
            for load in self._loads:
                for name, way in ways.items():
                    self._rounds[name, load[0].output_len].append(measure(way, load, rank_pids))

    def compare(self) -> None:
        print(f"{'':24}{'tokens':>8}" + "".join(f"{name:>14}" for name in SHOWN))
        middle = {key: medians(rounds) for key, rounds in self._rounds.items()}
        for (name, output_len), figures in sorted(middle.items(), key=lambda item: item[0][1]):
            shown = "".join(f"{figures[each]:14.1f}" for each in SHOWN)
            print(f"{name:24}{output_len:>8}{shown}")
            write_figures(figures | {"way": name, "output_len": output_len}, self._options.json)


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(each[name] for each in rounds) for name in rounds[0]}


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, default=TINY_MODEL)
    parser.add_argument("--dp-size", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

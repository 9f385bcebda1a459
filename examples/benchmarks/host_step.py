"""What a step of decodes costs a rank on the host, phase by phase, without a model.

    python -m examples.benchmarks.host_step
    python -m examples.benchmarks.host_step --requests 128 --steps 2000 --depth 0
    python -m examples.benchmarks.host_step --no-prefix-caching

One rank schedules steps as its loop does; the tokens are what the real sampler finds in logits over
a vocabulary of 8. "load" is what the rank posts about itself. Prints medians in microseconds.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

from dp_runtime import SamplingParams
from dp_runtime.core.attention_metadata import PageGeometry, Place, check_values
from dp_runtime.core.request import RankRequest
from dp_runtime.core.step_program import SERVING_PROGRAMS
from dp_runtime.prefix_cache.page_hash import PageHasher
from dp_runtime.sampling.row_logits import RowLogits
from dp_runtime.sampling.sampler import Sampled, Sampler
from dp_runtime.scheduler import scheduler
from dp_runtime.scheduler.batch_builder import build_batches
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser

PHASES = ("schedule", "build", "load", "check", "sample", "commit")
PAGE, CONTEXT, VOCAB, WARMUP = 64, 1024, 8, 50
PLACE = Place(0, 0, "target")


class Rank:
    """Steps of one rank that has nothing but decodes to do, timed by phase."""

    def __init__(
        self, num_requests: int, steps: int, depth: int, temperature: float, prefix_caching: bool
    ) -> None:
        longest = CONTEXT + PAGE + WARMUP + steps + 2
        pages = PageGeometry(1 + num_requests * -(-longest // PAGE), PAGE)
        limits = Limits(num_requests, 8192, longest)
        self.sampler = Sampler(VOCAB, limits.num_table_rows, torch.device("cpu"))
        hasher = PageHasher(PAGE, "no model") if prefix_caching else None
        self.scheduler = Scheduler(pages, limits, [self.sampler], hasher)
        self.depth = depth
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._in_flight: deque[tuple[SchedulerOutput, Sampled]] = deque()
        for number in range(num_requests):  # they cross page boundaries in different steps
            params = SamplingParams(max_tokens=longest, temperature=temperature)
            alone = (
                number % VOCAB,
                number // VOCAB % VOCAB,
                number // VOCAB**2,
            )  # it shares nothing
            prompt = (*alone, *(1,) * (CONTEXT - len(alone) + number % PAGE))
            request = RankRequest(number, prompt, params, number, frozenset({VOCAB}))
            self.scheduler.add(request)

    def step(self) -> bool:
        """One step; whether it had a prefill."""
        build = self._timed("build", build_batches)
        with patch.object(scheduler, "build_batches", build), self._phase("schedule"):
            scheduled = self.scheduler.schedule(SERVING_PROGRAMS[0])
        self.seconds["schedule"][-1] -= self.seconds["build"][-1]
        with self._phase("load"):
            _ = scheduled.real_rows, self.scheduler.queued_tokens
        with self._phase("check"):
            check_values(scheduled.batches[0], self.scheduler.pages, PLACE)
        logits = torch.randn(len(scheduled.samples), VOCAB)
        with self._phase("sample"):
            sampled = self.sampler.sample(RowLogits.from_logits(logits), scheduled.samples)
            self._in_flight.append((scheduled, sampled))
        if len(self._in_flight) > self.depth:
            with self._phase("commit"):
                launched, sampled = self._in_flight.popleft()
                self.scheduler.commit(launched, sampled.to_host())
        return scheduled.prefill

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[name].append(perf_counter() - start)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            with self._phase(name):
                return function(*arguments)

        return timed


def medians_us(num_requests: int, options: argparse.Namespace) -> list[float]:
    """Median microseconds of each phase once all requests decode."""
    own = options.depth, options.temperature, options.prefix_caching
    rank = Rank(num_requests, options.steps, *own)
    with torch.inference_mode():
        while rank.step():
            pass
        for _ in range(WARMUP + options.steps):
            assert not rank.step(), "only decodes are left"
    return [median(rank.seconds[phase][-options.steps :]) * 1e6 for phase in PHASES]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    print(machine.describe("torch", "numpy"), f"; load {os.getloadavg()[0]:.1f}")
    gc.freeze()
    print(f"depth {options.depth}, temperature {options.temperature:g}; median us of a step")
    print("requests " + " ".join(f"{name:>8}" for name in (*PHASES, "total")))
    for count in options.requests:
        times = medians_us(count, options)
        print(f"{count:>8} " + " ".join(f"{time:>8.1f}" for time in (*times, sum(times))))


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--depth", type=int, choices=(0, 1), default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Loads of requests that arrive over time, what came of each, and the figures of that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

import numpy as np

GOOD_TTFT_MS, GOOD_TPOT_MS = 500.0, 20.0


@dataclass(frozen=True)
class LoadRequest:
    prompt: list[int]
    output_len: int
    at_s: float = 0.0  # after the load's start


@dataclass(frozen=True)
class Answer:
    """What whoever asked has seen of one request; times are time.monotonic()."""

    submitted: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # when, how many tokens
    token_ids: list[int] = field(default_factory=list)

    def came(self, token_ids: Sequence[int]) -> None:
        self.arrivals.append((monotonic(), len(token_ids)))
        self.token_ids.extend(token_ids)

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0][0] - self.submitted

    @property
    def latency_s(self) -> float:
        return self.arrivals[-1][0] - self.submitted

    @property
    def tpot_s(self) -> float:
        """Seconds per output token after the first arrival; nan where there is no other."""
        later = sum(count for _, count in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else float("nan")


async def run_load(
    requests: Sequence[LoadRequest],
    ask: Callable[[LoadRequest], Awaitable[Answer]],
    at_most: int,
) -> list[Answer]:
    """Ask for each request at its time, so many at a time; answers in the requests' order."""
    places = asyncio.Semaphore(at_most)
    start = monotonic()

    async def in_its_time(request: LoadRequest) -> Answer:
        await asyncio.sleep(start + request.at_s - monotonic())
        async with places:
            return await ask(request)

    return list(await asyncio.gather(*map(in_its_time, requests)))


def check_answers(requests: Sequence[LoadRequest], answers: Sequence[Answer]) -> None:
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.token_ids) == request.output_len, "every request has its own length"


def figures_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Throughput and latencies, as whoever asked saw them."""
    start = min(answer.submitted for answer in answers)
    wall_s = max(answer.arrivals[-1][0] for answer in answers) - start
    tokens = sum(len(answer.token_ids) for answer in answers)
    ttft = np.array([answer.ttft_s for answer in answers]) * 1e3
    tpot = np.array([answer.tpot_s for answer in answers]) * 1e3
    latency = np.array([answer.latency_s for answer in answers]) * 1e3
    good = (ttft <= GOOD_TTFT_MS) & ~(tpot > GOOD_TPOT_MS)
    figures = {"output_tok_s": tokens / wall_s, "wall_s": wall_s, "good_share": good.mean()}
    for name, values in (("ttft", ttft), ("tpot", tpot), ("latency", latency)):
        for percent in (50, 99):
            shown = values[~np.isnan(values)]
            figures[f"{name}_p{percent}_ms"] = (
                float(np.percentile(shown, percent)) if len(shown) else float("nan")
            )
    return {name: round(value, 3) for name, value in figures.items()}

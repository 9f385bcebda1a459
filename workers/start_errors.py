"""The errors of several ranks as one, with equal ones named once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dp_runtime.errors import RankFailed, StartError


@dataclass(frozen=True)
class Failure:
    kind: type[BaseException]
    text: str
    dp_ranks: tuple[int, ...]

    def named(self, num_ranks: int, text: str) -> str:
        """Put the ranks before a text; an error that all of them have is no rank's own."""
        if len(self.dp_ranks) == num_ranks:
            return text
        return f"rank {', '.join(map(str, self.dp_ranks))}: {text}"


def raise_failures(step: str, futures: Sequence[Future[Any]]) -> None:
    """Raise one error for the ranks that failed or are late; ValueError if it is a mistake."""
    failures, num_ranks = failures_of(futures), len(futures)
    mistakes = [one for one in failures if issubclass(one.kind, ValueError)]
    if mistakes:
        raise ValueError("; ".join(one.named(num_ranks, one.text) for one in mistakes))
    if any(one.kind in (StartError, RankFailed) for one in failures):
        raise StartError("; ".join(one.text for one in failures))  # such texts name their rank
    if failures:
        texts = (one.named(num_ranks, f"{one.kind.__name__}: {one.text}") for one in failures)
        raise StartError("; ".join(texts))
    late = [rank for rank, future in enumerate(futures) if not future.done()]
    if late:
        raise StartError(f"ranks {late} did not finish {step!r} in time")


def failures_of(futures: Sequence[Future[Any]]) -> list[Failure]:
    """Return the errors of the futures that are done, in the order of their first ranks."""
    ranks: dict[tuple[type[BaseException], str], tuple[int, ...]] = {}
    for rank, future in enumerate(futures):
        error = future.exception() if future.done() else None
        if error is not None:
            key = (type(error), str(error))
            ranks[key] = (*ranks.get(key, ()), rank)
    return [Failure(kind, text, who) for (kind, text), who in ranks.items()]

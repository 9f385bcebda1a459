"""RequestTotals: what the driver has seen of the requests of one rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

from dp_runtime.core.request import FinishReason
from dp_runtime.metrics.histogram import SECONDS, Histogram


@dataclass
class RequestTotals:
    """Times from a request's submission to its rank until tokens were there for its user.

    The thread that asks this rank for outputs adds tokens, whoever holds the engine's lock ends.
    """

    dp_rank: int
    first_token_s: Histogram = field(default_factory=partial(Histogram.of, SECONDS))
    inter_token_s: Histogram = field(default_factory=partial(Histogram.of, SECONDS))
    request_s: Histogram = field(default_factory=partial(Histogram.of, SECONDS))
    ended: dict[FinishReason, int] = field(default_factory=Counter)
    moved: int = 0  # from the rank's queue to another rank
    expected_cached_tokens: int = 0  # of prompts that have begun, in the rank's prefix cache
    cached_tokens: int = 0  # and those that it found there

    def add_tokens(self, since_s: float, count: int, first: bool) -> None:
        """Add tokens that came together, `since_s` after those before, or after the submission."""
        if first:
            self.first_token_s.add(since_s)
        else:
            self.inter_token_s.add(since_s / count, count)

    def add_cached(self, expected: int, found: int) -> None:
        self.expected_cached_tokens += expected
        self.cached_tokens += found

    def add_end(self, reason: FinishReason, since_s: float) -> None:
        self.ended[reason] += 1
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.request_s.add(since_s)

    def copied(self) -> RequestTotals:
        return replace(
            self,
            first_token_s=self.first_token_s.copied(),
            inter_token_s=self.inter_token_s.copied(),
            request_s=self.request_s.copied(),
            ended=dict(self.ended),
        )

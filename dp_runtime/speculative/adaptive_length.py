"""AdaptiveLength: how many tokens the next step drafts."""

from __future__ import annotations

from dp_runtime.errors import require
from dp_runtime.parallel.agreement import StepTotals

DECAY = 0.98  # per step: the sums look back some 50 steps
REVIEW_STEPS = 16  # steps with drafts between two choices
MARGIN = 0.03  # another length is taken if it promises so much more output per time
LATE_STEPS = 2  # after a change, sums of so many agreements may be of the length before
# One more draft with its row to verify, in steps without drafts, on H200s with a Qwen3-30B-A3B
# shape: 0.13 at 16 requests a rank, 0.22 at 128 (examples/benchmarks/RESULTS.md).
DRAFT_COST = 0.15


def mean_accepted(p: float, num_drafts: int) -> float:
    """Return p + p^2 + ... + p^num_drafts (Leviathan et al., 2023, equation 1, less its 1)."""
    total = 0.0
    for _ in range(num_drafts):
        total = p * (1.0 + total)
    return total


def acceptance(mean: float, num_drafts: int) -> float:
    """Solve mean_accepted(p, num_drafts) == mean for p, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if mean_accepted(middle, num_drafts) < mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class AdaptiveLength:
    """Chooses the draft length with the most output per time (docs/speculation.md, "Adaptive").

    NOTE: all ranks must choose alike, so its state depends on nothing but the sums agreed on since
    the epoch began, by operations that round alike everywhere.
    """

    def __init__(self, num_programs: int, cost: float = DRAFT_COST) -> None:
        assert num_programs >= 1, f"{num_programs} programs"
        require(0 < cost < float("inf"), "cost", cost, "a positive number")
        self._num_programs = num_programs
        self._cost = cost
        self._verified = 0.0  # smoothed sums, as of the length that is drafted now
        self._accepted = 0.0
        self._num_late = 0  # agreements to come whose sums may be of another length
        self._num_steps = 0  # counted since the last review

    def __call__(self, totals: StepTotals) -> int:
        current = totals.program_id
        assert 0 <= current < self._num_programs, f"program {current} of {self._num_programs}"
        if self._num_late:
            self._num_late -= 1
            return current
        if not totals.drafts_proposed:
            return current
        self._verified = DECAY * self._verified + totals.drafts_proposed / (current + 1)
        self._accepted = DECAY * self._accepted + totals.drafts_accepted
        self._num_steps += 1
        if self._num_steps < REVIEW_STEPS:
            return current
        self._num_steps = 0
        return self._review(current)

    def _review(self, current: int) -> int:
        """Keep the length, or change it and restate the sums as that length would have had them."""
        p = acceptance(self._accepted / self._verified, current + 1)
        rates = [self._rate(p, length) for length in range(1, self._num_programs + 1)]
        best = max(range(self._num_programs), key=rates.__getitem__)
        if rates[best] <= (1 + MARGIN) * rates[current]:
            return current
        self._accepted = self._verified * mean_accepted(p, best + 1)
        self._num_late = LATE_STEPS
        return best

    def _rate(self, p: float, num_drafts: int) -> float:
        return (1 + mean_accepted(p, num_drafts)) / (1 + num_drafts * self._cost)

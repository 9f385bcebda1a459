"""PrefillBudget: how many prompt tokens each rank may take into the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple


class StepLoad(NamedTuple):
    """What all ranks know of a step, and how long an earlier one took."""

    prefill_rows: int  # of the rank that has most
    num_sampling: int  # requests of all ranks that get a token
    step_us: int  # of the step `lag` steps before: of the rank that took longest, 0 if unknown


BudgetPolicy = Callable[[StepLoad], int | None]  # of each rank in the step after; None: no limit


def no_budget(load: StepLoad) -> int | None:
    return None


FLOOR_SHARE = 8  # the least budget is this part of max_num_tokens
DECAY = 0.9  # per step with prefill: the sums look back some 10 steps
DECODE_WEIGHT = 0.1  # of the newest step without prefill in the mean of such steps
MAX_TARGETS = 4.0  # a step counts as this many targets at most: a pause tells nothing of prefill


class PrefillBudget:
    """Keeps steps to a target while requests wait for tokens ("Prompts beside decodes" in docs).

    A step is taken to last as long as one without prefill, and some more for each prompt token of
    the rank that has most. Both are measured. Where a step's time is no such line, a budget that is
    used up still comes to rest only where steps last as long as the target.

    NOTE: all ranks must choose alike, so its state depends on nothing but what was agreed on since
    the epoch began, by operations that round alike everywhere.
    """

    def __init__(self, max_step_ms: float, max_num_tokens: int, lag: int) -> None:
        """Make the state of an epoch.

        lag: agreements from a step's own to the one that knows how long it took.
        """
        assert lag >= 1, f"a lag of {lag}"
        self.max_rows = max_num_tokens
        self.min_rows = -(-max_num_tokens // FLOOR_SHARE)
        self._target_us = max_step_ms * 1e3
        self._untimed: deque[int | None] = deque([None] * lag)  # rows of steps that tell something
        self._limited = False  # whether this step has a budget
        self._decode_us = 0.0  # of a step without prefill
        self._steps = self._rows = self._us = 0.0  # smoothed sums over steps with prefill

    def __call__(self, load: StepLoad) -> int | None:
        rows = self._untimed.popleft()
        if rows is not None and load.step_us:
            self._learn(rows, min(load.step_us, MAX_TARGETS * self._target_us))
        # Few rows tell little of what each costs, and steps without a budget little of those with.
        tells = not load.prefill_rows or (self._limited and load.prefill_rows >= self.min_rows)
        self._untimed.append(load.prefill_rows if tells else None)
        self._limited = load.num_sampling > 0
        return self._budget() if self._limited else None

    def _learn(self, rows: int, step_us: float) -> None:
        if rows:
            self._steps = DECAY * self._steps + 1
            self._rows = DECAY * self._rows + rows
            self._us = DECAY * self._us + step_us
        else:
            weight = DECODE_WEIGHT if self._decode_us else 1.0
            self._decode_us += weight * (step_us - self._decode_us)

    def _budget(self) -> int:
        room_us = self._target_us - self._decode_us
        prefill_us = self._us - self._steps * self._decode_us
        if not self._rows or room_us <= 0:
            return self.min_rows
        if prefill_us * self.max_rows <= room_us * self._rows:
            return self.max_rows
        return max(self.min_rows, int(room_us * self._rows / prefill_us))


def budget_policy(max_step_ms: float | None, max_num_tokens: int, depth: int) -> BudgetPolicy:
    """Return an epoch's policy; `depth` steps are in flight when the next one is agreed on."""
    return (
        no_budget if max_step_ms is None else PrefillBudget(max_step_ms, max_num_tokens, depth + 1)
    )

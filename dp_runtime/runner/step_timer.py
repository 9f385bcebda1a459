"""Timers of the host's phases; waits for other ranks are counted apart."""

from __future__ import annotations

from time import perf_counter

from dp_runtime.core.device_copy import HostCopy
from dp_runtime.core.step_program import Pass
from dp_runtime.metrics.trace import PassTrace
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.execution_plan import ExecutionPlan
from dp_runtime.parallel.step_board import StepBoard


class StepTimer:
    """Measures the seconds of a step's first phases, from its making on."""

    schedule_s = agree_s = agree_wait_s = 0.0

    def __init__(self, board: StepBoard) -> None:
        self._board, self._waited = board, board.waited_s
        self.started = perf_counter()

    def end_schedule(self) -> None:
        self.schedule_s = perf_counter() - self.started

    def end_agree(self) -> None:
        self.agree_wait_s = self._board.waited_s - self._waited
        self.agree_s = perf_counter() - self.started - self.schedule_s - self.agree_wait_s


class StepClock:
    """Measures steps from when the device had the tokens of one to when it had the next one's.

    So a step gets the time that it took, however early the host launched it.
    """

    def __init__(self) -> None:
        self._last: HostCopy | None = None
        self._us: dict[int, int] = {}  # by step id, until they are taken

    def committed(self, step_id: int, started_s: float, tokens: HostCopy) -> None:
        seconds = perf_counter() - started_s  # less only if the loop had slept before
        if self._last is not None:
            seconds = min(seconds, tokens.seconds_since(self._last))
        self._last = tokens
        self._us[step_id] = round(seconds * 1e6)

    def take_us(self, step_id: int) -> int:
        return self._us.pop(step_id, 0)


class PassTimer:
    """Measures the seconds of one pass, from its making on."""

    def __init__(self, collective: RowCollective) -> None:
        self._collective, self._waited = collective, collective.waited_s
        self._started = self._forward_start = perf_counter()

    def end_prepare(self) -> None:
        """End preparing; a replay, which takes its inputs in, never does: it is all forward."""
        self._forward_start = perf_counter()

    @property
    def prepare_s(self) -> float:
        return self._forward_start - self._started

    def trace(self, pass_kind: Pass, plan: ExecutionPlan, num_moe_layers: int) -> PassTrace:
        padding = plan.padding
        return PassTrace(
            pass_kind=pass_kind,
            mode=plan.mode,
            real_rows=padding.real_rows,
            gathered_rows=padding.gathered_rows,
            wire_rows=padding.wire_rows * 2 * num_moe_layers,
            start_s=self._forward_start,
            prepare_s=self.prepare_s,
            forward_s=perf_counter() - self._forward_start,
            wait_s=self._collective.waited_s - self._waited,
        )

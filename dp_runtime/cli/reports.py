"""Reports on ranks and steps, as commands print them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from dp_runtime.metrics.memory import memory_table
from dp_runtime.metrics.status import RankHealth
from dp_runtime.metrics.trace import StepTrace


def rank_memory(ranks: Sequence[RankHealth]) -> str:
    table = memory_table([rank.memory for rank in ranks if rank.memory])
    graphs = f"; rank 0's {ranks[0].graphs}" if ranks[0].graphs else ""
    return f"{table}\nloaded in {max(rank.load_s for rank in ranks):.1f} s{graphs}"


def step_times(steps: Sequence[StepTrace]) -> str:
    def milliseconds(values: list[float]) -> str:
        return f"median {median(values) * 1e3:.2f} ms, longest {max(values) * 1e3:.2f} ms"

    busy = [step.busy_s for step in steps]
    wait = [step.wait_s for step in steps]
    return f"a rank's step: busy {milliseconds(busy)}; wait {milliseconds(wait)}"

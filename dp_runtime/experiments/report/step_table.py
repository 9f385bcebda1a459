"""StepTable: the steps of all ranks as arrays, a row for each step and a column for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dp_runtime.experiments.report.bins import Float64
from dp_runtime.metrics.trace import StepTrace


@dataclass(frozen=True, eq=False)
class StepTable:
    """Steps in the order of their time; nan where a rank has no such step (any more)."""

    dp_ranks: tuple[int, ...]
    at_s: Float64  # [steps] from the first on, on the clock of the first rank that has the step
    real: Float64  # [steps, ranks] rows of a rank, all passes
    gathered: Float64  # [steps, ranks] padding included
    largest: Float64  # [steps] rows of the largest rank of each pass
    busy_s: Float64  # [steps, ranks]
    wait_s: Float64  # [steps, ranks] for slower ranks
    cached_pages: Float64  # [steps, ranks]
    free_pages: Float64  # [steps, ranks] cached ones that nobody holds among them
    queries: Float64  # [steps, ranks] tokens looked up in the prefix cache since the rank's start
    hits: Float64  # [steps, ranks]

    @classmethod
    def of(cls, steps: Sequence[StepTrace]) -> StepTable:
        """Lay out the steps of at least one rank."""
        dp_ranks = tuple(sorted({step.dp_rank for step in steps}))
        places = {key: at for at, key in enumerate(sorted({(s.epoch, s.step_id) for s in steps}))}
        column = {rank: at for at, rank in enumerate(dp_ranks)}
        values = np.full((8, len(places), len(dp_ranks)), np.nan)
        of_step = np.full((2, len(places)), np.nan)
        for step in sorted(steps, key=lambda each: each.dp_rank, reverse=True):
            at, index = places[step.epoch, step.step_id], step.index
            of_step[:, at] = step.start_s, sum(each.max_rows for each in step.passes)
            values[:, at, column[step.dp_rank]] = (
                sum(each.real_rows[index] for each in step.passes),
                sum(each.gathered_rows[index] for each in step.passes),
                step.busy_s, step.wait_s,
                step.prefixes.cached_pages, np.nan if step.free_pages is None else step.free_pages,
                step.prefixes.queries, step.prefixes.hits,
            )  # fmt: skip
        order = np.argsort(of_step[0], kind="stable")
        start_s, largest = of_step[:, order]
        real, gathered, busy_s, wait_s, cached, free, queries, hits = values[:, order]
        return cls(
            dp_ranks, start_s - start_s[0], real, gathered, largest, busy_s, wait_s, cached, free,
            queries, hits,
        )  # fmt: skip

    @property
    def num_steps(self) -> int:
        return len(self.at_s)

    @property
    def duration_s(self) -> Float64:  # [steps] of the rank that took longest
        return np.asarray(np.nanmax(self.busy_s + self.wait_s, axis=1), np.float64)

    def waste(self) -> tuple[Float64, Float64]:
        """Return each step's share of gathered rows that are padding, and its weight in a mean."""
        gathered = np.nansum(self.gathered, axis=1)
        return _ratio(gathered - np.nansum(self.real, axis=1), gathered), gathered

    def balance(self) -> tuple[Float64, Float64]:
        """Return mean rows of a rank over those of the largest, and its weight in a mean."""
        room = self.largest * np.sum(~np.isnan(self.real), axis=1)
        return _ratio(np.nansum(self.real, axis=1), room), room

    def waited_for(self) -> Float64:
        """Sum up seconds [waiting rank, rank waited for]: the one that waited least in a step."""
        several = np.sum(~np.isnan(self.wait_s), axis=1) > 1
        wait_s = self.wait_s[several]
        slowest = np.nanargmin(wait_s, axis=1) if len(wait_s) else np.zeros(0, np.int64)
        found = np.zeros((len(self.dp_ranks), len(self.dp_ranks)))
        np.add.at(found.T, slowest, np.nan_to_num(wait_s))
        np.fill_diagonal(found, 0.0)
        return found


def _ratio(part: Float64, whole: Float64) -> Float64:
    ratio: Float64 = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return ratio

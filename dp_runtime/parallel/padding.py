"""Padding for the MoE collectives: the modes, the plan of one stage, `pad` and `strip`.

Only the MoE stage's `PaddedExchange` calls `pad` and `strip`; a batch never learns a padded size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class PaddingMode(StrEnum):
    """How the ranks' rows are laid out for a collective."""

    MAX_LEN = "max_len"  # every rank contributes the largest rank's rows
    RAGGED = "ragged"  # every rank contributes its own rows
    AUTO = "auto"  # the cheaper of the two for the counts at hand


@dataclass(frozen=True)
class PaddingCost:
    """Time of an all-gather and reduce-scatter pair: base + rows * per_row, in nanoseconds."""

    max_len_base: int
    max_len_per_row: int
    ragged_base: int
    ragged_per_row: int

    def choose(self, real_rows: tuple[int, ...]) -> PaddingMode:
        """The cheaper mode for these counts; a pure function, so that all ranks choose alike."""
        padded = self.max_len_base + self.max_len_per_row * max(real_rows) * len(real_rows)
        ragged = self.ragged_base + self.ragged_per_row * sum(real_rows)
        return PaddingMode.RAGGED if ragged < padded else PaddingMode.MAX_LEN


@dataclass(frozen=True)
class PaddingPlan:
    """Rows of every rank in one MoE stage: what is real, and what enters the collective."""

    dp_rank: int
    real_rows: tuple[int, ...]
    gathered_rows: tuple[int, ...]
    counted: bool = False  # the device counts the real rows, and only they cross the wire

    def __post_init__(self) -> None:
        assert len(self.real_rows) == len(self.gathered_rows), f"one count per rank: {self}"
        assert all(r <= g for r, g in zip(self.real_rows, self.gathered_rows)), (
            f"a rank gathers at least its real rows: {self}"
        )

    @classmethod
    def of(cls, mode: PaddingMode, dp_rank: int, real_rows: tuple[int, ...]) -> PaddingPlan:
        """The plan of `max_len` or `ragged` for these counts."""
        match mode:
            case PaddingMode.MAX_LEN:
                gathered = (max(real_rows),) * len(real_rows)
            case PaddingMode.RAGGED:
                gathered = real_rows
            case _:
                raise AssertionError(f"{mode} is resolved before a plan is made")
        return cls(dp_rank, real_rows, gathered)

    @property
    def own_real(self) -> int:
        return self.real_rows[self.dp_rank]

    @property
    def own_gathered(self) -> int:
        return self.gathered_rows[self.dp_rank]

    @property
    def total_real(self) -> int:
        return sum(self.real_rows)

    @property
    def total_gathered(self) -> int:
        return sum(self.gathered_rows)

    @property
    def wire_rows(self) -> int:
        """Rows that reach another rank in one collective of this plan."""
        crossing = self.total_real if self.counted else self.total_gathered
        return crossing * (len(self.real_rows) - 1)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each rank's rows begin among the gathered ones."""
        return tuple(accumulate(self.gathered_rows[:-1], initial=0))

    @cached_property
    def row_ranges(self) -> NDArray[np.int32]:
        """[2, ranks]: where each rank's rows begin, and how many of them are real."""
        return np.array([self.starts, self.real_rows], np.int32)

    @cached_property
    def real_index(self) -> Tensor | None:
        """Where the real rows lie among the gathered ones, [total_real] int64; None if all are."""
        if self.total_real == self.total_gathered:
            return None
        return torch.cat(
            [torch.arange(start, start + real) for start, real in zip(self.starts, self.real_rows)]
        )


def pad(rows: Tensor, plan: PaddingPlan, poison: bool = False) -> Tensor:
    """This rank's real rows [own_real, hidden] -> [own_gathered, hidden]; the tail is 0, or NaN."""
    assert rows.shape[0] == plan.own_real, f"{rows.shape[0]} rows, the plan says {plan.own_real}"
    tail = plan.own_gathered - plan.own_real
    if tail == 0:
        return rows
    fill = rows.new_full((tail, *rows.shape[1:]), float("nan") if poison else 0.0)
    return torch.cat([rows, fill])


def strip(rows: Tensor, plan: PaddingPlan) -> Tensor:
    """This rank's gathered rows [own_gathered, hidden] -> its real rows [own_real, hidden]."""
    assert rows.shape[0] == plan.own_gathered, (
        f"{rows.shape[0]} rows, the plan says {plan.own_gathered}"
    )
    return rows[: plan.own_real]

"""Padding for the MoE collectives; a batch never learns a padded size."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_runtime.core.device_copy import on_device


class PaddingMode(StrEnum):
    MAX_LEN = "max_len"  # those of the largest rank
    RAGGED = "ragged"  # its own
    AUTO = "auto"  # the cheaper of the two for the counts at hand


@dataclass(frozen=True)
class PaddingCost:
    """Time of an all-gather and reduce-scatter pair: base + rows * per_row, in nanoseconds."""

    max_len_base: int
    max_len_per_row: int
    ragged_base: int
    ragged_per_row: int

    def choose(self, real_rows: tuple[int, ...]) -> PaddingMode:
        padded = self.max_len_base + self.max_len_per_row * max(real_rows) * len(real_rows)
        ragged = self.ragged_base + self.ragged_per_row * sum(real_rows)
        return PaddingMode.RAGGED if ragged < padded else PaddingMode.MAX_LEN


@dataclass(frozen=True)
class PaddingPlan:
    """Rows of every rank in one MoE stage, real and gathered; identical on all ranks."""

    real_rows: tuple[int, ...]  # [rank]
    gathered_rows: tuple[int, ...]  # [rank]
    counted: bool = False  # the device counts the real rows, and only they cross the wire

    def __post_init__(self) -> None:
        assert len(self.real_rows) == len(self.gathered_rows), f"one count per rank: {self}"
        assert all(r <= g for r, g in zip(self.real_rows, self.gathered_rows)), (
            f"a rank gathers at least its real rows: {self}"
        )

    @classmethod
    def for_mode(cls, mode: PaddingMode, real_rows: tuple[int, ...]) -> PaddingPlan:
        match mode:
            case PaddingMode.MAX_LEN:
                return cls(real_rows, (max(real_rows),) * len(real_rows))
            case PaddingMode.RAGGED:
                return cls(real_rows, real_rows)
            case _:
                raise AssertionError(f"{mode} is resolved before a plan is made")

    @property
    def rows_per_rank(self) -> int:
        """Return the gathered rows of each rank, where a graph's bucket makes them equal."""
        return self.gathered_rows[0]

    @property
    def total_real(self) -> int:
        return sum(self.real_rows)

    @property
    def total_gathered(self) -> int:
        return sum(self.gathered_rows)

    @property
    def wire_rows(self) -> int:  # those that reach another rank in one collective
        crossing = self.total_real if self.counted else self.total_gathered
        return crossing * (len(self.real_rows) - 1)

    @cached_property
    def offsets(self) -> tuple[int, ...]:  # of each rank's first gathered row
        return tuple(accumulate(self.gathered_rows[:-1], initial=0))

    @cached_property
    def row_ranges(self) -> NDArray[np.int32]:
        """Return each rank's first row among the gathered, and how many are real: [2, dp_size]."""
        return np.array([self.offsets, self.real_rows], np.int32)

    def row_ranges_on(self, device: torch.device) -> Tensor:
        """Copy row_ranges once: the MoE stages of a pass share the copy."""
        if device not in self._copies:
            self._copies[device] = on_device(self.row_ranges, device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def real_index(self) -> Tensor | None:
        """Find the real rows among the gathered, [total_real] int64; None if all are real."""
        if self.total_real == self.total_gathered:
            return None
        return torch.cat(
            [torch.arange(start, start + real) for start, real in zip(self.offsets, self.real_rows)]
        )


@dataclass(frozen=True)
class PaddingPolicy:
    mode: PaddingMode = PaddingMode.MAX_LEN
    cost: PaddingCost | None = None  # decides where the mode is `auto`; the same on all ranks

    def plan(self, real_rows: tuple[int, ...]) -> PaddingPlan:
        mode = self.mode
        if mode is PaddingMode.AUTO:
            assert self.cost is not None, "padding auto needs the cost measured at start"
            mode = self.cost.choose(real_rows)
        return PaddingPlan.for_mode(mode, real_rows)


def pad(rows: Tensor, plan: PaddingPlan, dp_rank: int, poison: bool = False) -> Tensor:
    """Fill a rank's rows [real, hidden] up to [gathered, hidden] with 0, or NaN."""
    real, gathered = plan.real_rows[dp_rank], plan.gathered_rows[dp_rank]
    assert rows.shape[0] == real, f"{rows.shape[0]} rows, the plan says {real}"
    if gathered == real:
        return rows
    fill = rows.new_full((gathered - real, *rows.shape[1:]), float("nan") if poison else 0.0)
    return torch.cat([rows, fill])


def strip(rows: Tensor, plan: PaddingPlan, dp_rank: int) -> Tensor:
    """Cut a rank's rows [gathered, hidden] back to [real, hidden]."""
    gathered = plan.gathered_rows[dp_rank]
    assert rows.shape[0] == gathered, f"{rows.shape[0]} rows, the plan says {gathered}"
    return rows[: plan.real_rows[dp_rank]]

"""What a rank's device memory is used for: predicted from shapes, measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a rank's device memory by what holds them.

    workspaces: what attention backends and cuBLAS keep. activations: the most that a step needs at
    once, beside what stays from step to step.
    """

    weights: int
    workspaces: int
    activations: int
    kv_cache: int

    @property
    def total(self) -> int:
        return self.weights + self.workspaces + self.activations + self.kv_cache


@dataclass(frozen=True)
class RankMemory:
    """What a rank was planned to use and what it uses; nothing is measured on a CPU."""

    dp_rank: int
    predicted: MemoryUse
    measured: MemoryUse | None = None


def memory_table(ranks: Sequence[RankMemory]) -> str:
    """The ranks' memory in MiB, predicted and, where it was measured, that beside it."""
    names = [field.name for field in fields(MemoryUse)]
    measured = all(rank.measured for rank in ranks)
    head = "predicted / measured" if measured else "predicted; only running GPU ranks measure it"
    lines = [
        f"memory in MiB, {head}",
        "rank" + "".join(f"{name.replace('_', ' '):>22}" for name in names),
    ]
    for rank in ranks:
        uses = [rank.predicted] if rank.measured is None else [rank.predicted, rank.measured]
        cells = [" / ".join(_mib(getattr(use, name)) for use in uses) for name in names]
        lines.append(f"{rank.dp_rank:>4}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"

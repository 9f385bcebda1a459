"""A rank's device memory, planned and in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a rank's device memory by what holds them."""

    weights: int
    workspaces: int  # of attention backends and cuBLAS
    activations: int  # the most that a step needs at once, and frees again
    kv_cache: int
    recurrent_state: int = 0
    image_features: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class RankMemory:
    dp_rank: int
    predicted: MemoryUse
    measured: MemoryUse | None = None


def memory_table(ranks: Sequence[RankMemory]) -> str:
    names = [field.name for field in fields(MemoryUse)]
    for name in ("recurrent_state", "image_features"):
        if not any(getattr(rank.predicted, name) for rank in ranks):
            names.remove(name)
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

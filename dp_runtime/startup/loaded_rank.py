"""LoadedRank: a rank's models and pages, before it meets the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.metrics.status import ModelInfo
from dp_runtime.startup.served_models import ServedModels


@dataclass(frozen=True, eq=False)
class KeptPages:
    """What a rank keeps while its weights are exchanged."""

    backends: Sequence[AttentionBackend]  # of the model, then of its draft
    pools: Sequence[Tensor]
    info: ModelInfo
    allocated_before: int


@dataclass(frozen=True, eq=False)
class LoadedRank:
    """A rank's models over their page pools, and the facts that the driver asks for."""

    models: ServedModels
    backends: Sequence[AttentionBackend]  # of the model, then of its draft
    pools: Sequence[Tensor]  # [layer], those of a draft after the model's
    info: ModelInfo
    load_s: float
    allocated_before: int  # bytes of the GPU's memory; 0 on a CPU

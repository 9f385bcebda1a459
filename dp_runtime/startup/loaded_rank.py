"""LoadedRank: a rank's models and pages, before it meets the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dp_runtime.metrics.status import ModelInfo
from dp_runtime.startup.served_models import ServedModels


@dataclass(frozen=True, eq=False)
class LoadedRank:
    """A rank's models over their page pools, and the facts that the driver asks for."""

    models: ServedModels
    pools: Sequence[Tensor]  # [layer], those of a draft after the model's
    info: ModelInfo
    load_s: float
    allocated_before: int  # bytes of the GPU's memory; 0 on a CPU

"""LoadedRank: a rank's models and caches, before it meets the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.core.cache_spec import LayerState
from dp_runtime.metrics.status import ModelInfo
from dp_runtime.startup.served_models import ServedModels


@dataclass(frozen=True, eq=False)
class KeptCaches:
    """What a rank keeps while its weights are exchanged."""

    backends: Sequence[AttentionBackend]  # of the model, then of its draft
    pools: Sequence[Tensor]
    states: Sequence[LayerState]
    info: ModelInfo
    allocated_before: int


@dataclass(frozen=True, eq=False)
class LoadedRank:
    """A rank's models over their caches, and the facts that the driver asks for."""

    models: ServedModels
    backends: Sequence[AttentionBackend]  # of the model, then of its draft
    pools: Sequence[Tensor]  # of layers that attend, those of a draft after the model's
    states: Sequence[LayerState]  # [layer] of the model; empty where it attends
    info: ModelInfo
    load_s: float
    allocated_before: int  # bytes of the GPU's memory; 0 on a CPU

"""What a run would refuse, as far as this host can tell without starting ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dp_runtime.config import EngineConfig
from dp_runtime.experiments.point import Point
from dp_runtime.experiments.workload.conversations import check_load
from dp_runtime.models.registry import read_model_config
from dp_runtime.startup.devices import resolve_device
from dp_runtime.startup.rank_plan import plan_rank


def check_points(points: Sequence[Point]) -> None:
    """Raise ValueError, which names the point, for one that could not be served."""
    lengths: dict[EngineConfig, int | None] = {}
    for point in points:
        config = point.config
        try:
            if config not in lengths:
                lengths[config] = _max_model_len(config)
            conversations = point.workload.conversations(config.dp_size)
            check_load(conversations, lengths[config], config.max_queued_requests)
        except ValueError as error:
            raise ValueError(f"{point}: {error}") from None


def _max_model_len(config: EngineConfig) -> int | None:
    """Plan a rank; of those of a cluster, which this host may be none of, what is known here."""
    if config.launcher != "ray":
        config = resolve_device(config, torch.cuda.device_count(), "this host")
        return plan_rank(config, 0, config.device).limits.max_model_len
    if not Path(config.model).is_dir():
        return config.max_model_len
    return read_model_config(config.model).resolve_max_model_len(config.max_model_len)

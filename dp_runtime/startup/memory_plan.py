"""MemoryPlan: a rank's memory for weights, workspaces and activations; pages get the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dp_runtime.attention.registry import backend_class
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.config import EngineConfig
from dp_runtime.core.metadata import PageGeometry
from dp_runtime.errors import require
from dp_runtime.metrics.memory import MemoryUse
from dp_runtime.scheduler.limits import Limits
from dp_runtime.startup.device_memory import CUBLAS_BYTES, rank_memory
from dp_runtime.startup.memory_estimate import activation_peak, captured_bytes, param_bytes
from dp_runtime.startup.served_models import ServedModels

KV_MEMORY_FRACTION = {"cpu": 0.5, "cuda": 0.9}  # by device, where the config has none


@dataclass(frozen=True)
class MemoryPlan:
    pages: PageGeometry
    use: MemoryUse


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """A rank's models on the meta device, and what they allocate with."""

    device: str
    models: ServedModels
    limits: Limits
    backend: str
    attention: Sequence[AttentionSpec]  # of the model, and of its draft
    page_bytes: int  # of one page over all layers
    graphs: bool


def plan_memory(config: EngineConfig, needs: MemoryNeeds) -> MemoryPlan:
    """Count bytes from shapes alone; ValueError, with the fix, if too few pages fit."""
    models, limits, size = needs.models, needs.limits, config.dp_size
    on_gpu = needs.device != "cpu"
    cls = backend_class(needs.backend)
    workspaces = sum(cls.workspace_bytes(spec) for spec in needs.attention)
    memory = MemoryUse(
        weights=param_bytes(models),
        workspaces=workspaces + (CUBLAS_BYTES if on_gpu else 0),
        activations=activation_peak(models, limits, size, config.padding != "ragged"),
        kv_cache=0,
    )
    target = models.target
    exchanged = size * limits.max_num_tokens * target.hidden_size * target.dtype.itemsize
    buffers = 2 * exchanged if on_gpu and size > 1 else 0
    captured = captured_bytes(models, limits, size) if needs.graphs else 0
    pages = _page_geometry(config, needs, memory.total + buffers + captured)
    return MemoryPlan(pages, replace(memory, kv_cache=pages.num_pages * needs.page_bytes))


def _page_geometry(config: EngineConfig, needs: MemoryNeeds, used: int) -> PageGeometry:
    """Take the pages asked for; else what the limits can use, within a fraction of the rest.

    NOTE: of all memory, not of what happens to be free: every start comes to the same number.
    """
    size, one_page, length = config.page_size, needs.page_bytes, needs.limits.max_cached_len
    memory = rank_memory(needs.device, config.dp_size, config.ranks_per_gpu)
    one_sequence = -(-length // size) + 1
    drafts = config.speculative_num_steps
    sequence = f"max_model_len {length - drafts}" + (f" and {drafts} drafts" if drafts else "")
    if config.num_pages is not None:
        require(
            config.num_pages >= one_sequence, "num_pages", config.num_pages,
            f"at least {one_sequence}: {sequence} in pages of {size}, and the null page; or lower "
            "max_model_len",
        )  # fmt: skip
        max_pages = max(memory - used, 0) // one_page
        require(
            config.num_pages <= max_pages, "num_pages", config.num_pages,
            f"at most {max_pages}: {one_page:,} bytes each in what {used:,} leave of {memory:,}",
        )  # fmt: skip
        return PageGeometry(config.num_pages, size)
    fraction = config.kv_memory_fraction or KV_MEMORY_FRACTION[torch.device(needs.device).type]
    affordable = int((memory - used) * fraction // one_page)
    require(
        affordable >= one_sequence, "kv_memory_fraction", fraction,
        f"memory for {one_sequence} pages: {sequence} needs them and "
        f"{max(affordable, 0)} fit; lower max_model_len or raise kv_memory_fraction",
    )  # fmt: skip
    wanted = (one_sequence - 1) * config.max_num_requests + 1
    return PageGeometry(min(wanted, affordable), size)

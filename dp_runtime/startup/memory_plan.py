"""MemoryPlan: a rank's memory for weights, workspaces and activations; pages get the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dp_runtime.attention.registry import backend_class
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.config import EngineConfig
from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.errors import require
from dp_runtime.metrics.memory import MemoryUse
from dp_runtime.scheduler.limits import Limits
from dp_runtime.startup.device_memory import CUBLAS_BYTES, rank_memory
from dp_runtime.startup.memory_estimate import activation_peak, captured_bytes, param_bytes
from dp_runtime.startup.memory_shortage import MemoryBudget, copy_shortage
from dp_runtime.startup.served_models import ServedModels

KV_MEMORY_FRACTION = {"cpu": 0.5, "cuda": 0.9}  # by device, where the config has none


@dataclass(frozen=True)
class MemoryPlan:
    pages: PageGeometry
    use: MemoryUse
    shortage: str  # why it does not fit; empty if it does


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """A rank's models on the meta device, and what they allocate with."""

    device: str
    models: ServedModels
    limits: Limits
    backend: str
    attention: Sequence[AttentionSpec]  # of the model, and of its draft
    page_bytes: int  # of one page over all layers
    slot_bytes: int  # of one request's recurrent state over all layers
    graphs: bool
    dp_size: int
    host_copy: int  # bytes of the host's memory that keep the weights
    routing_bytes: int = 0  # of the buffer that keeps routers' choices
    set_aside: int = 0  # bytes of weights that the rank may take over


def plan_memory(config: EngineConfig, needs: MemoryNeeds) -> MemoryPlan:
    """Count bytes from shapes alone, and say what is missing if they do not fit."""
    models, limits, size = needs.models, needs.limits, needs.dp_size
    on_gpu = needs.device != "cpu"
    cls = backend_class(needs.backend)
    workspaces = sum(cls.workspace_bytes(spec) for spec in needs.attention)
    target = models.target
    row = target.hidden_size * target.dtype.itemsize
    memory = MemoryUse(
        weights=param_bytes(models),
        workspaces=workspaces + needs.routing_bytes + (CUBLAS_BYTES if on_gpu else 0),
        activations=activation_peak(models, limits, size, config.padding != "ragged"),
        kv_cache=0,
        recurrent_state=limits.num_state_slots * needs.slot_bytes,
        image_features=limits.num_image_slots * row,
    )
    exchanged = size * limits.max_num_tokens * row
    buffers = 2 * exchanged if on_gpu and size > 1 else 0
    captured = captured_bytes(models, limits, size) if needs.graphs else 0
    length, page = limits.max_cached_len, config.page_size
    budget = MemoryBudget(
        memory=rank_memory(needs.device, size, config.ranks_per_gpu),
        use=memory,
        other=buffers + captured + needs.set_aside,
        page_bytes=needs.page_bytes,
        slot_bytes=needs.slot_bytes,
        num_state_slots=limits.num_state_slots,
        max_model_len=limits.max_model_len,
        one_sequence=-(-length // page) + 1,
        dtype_bytes=target.dtype.itemsize,
        host_copy=0 if on_gpu else needs.host_copy,
    )
    fraction = config.kv_memory_fraction or KV_MEMORY_FRACTION[torch.device(needs.device).type]
    num_pages = _num_pages(config, budget, length, fraction)
    return MemoryPlan(
        PageGeometry(num_pages, page),
        replace(memory, kv_cache=num_pages * needs.page_bytes),
        budget.shortage(config, fraction) or copy_shortage(needs.host_copy, size),
    )


def _num_pages(config: EngineConfig, budget: MemoryBudget, length: int, fraction: float) -> int:
    """Take the pages asked for; else what the limits can use, within a fraction of the rest.

    NOTE: of all memory, not of what happens to be free: every start comes to the same number.
    Where too few fit it is what one sequence needs.
    """
    one_sequence, drafts = budget.one_sequence, config.speculative_num_steps
    if config.num_pages is not None:
        sequence = f"max_model_len {length - drafts}" + (f" and {drafts} drafts" if drafts else "")
        require(
            config.num_pages >= one_sequence, "num_pages", config.num_pages,
            f"at least {one_sequence}: {sequence} in pages of {config.page_size}, and the null "
            "page; or lower max_model_len",
        )  # fmt: skip
        return config.num_pages
    wanted = (one_sequence - 1) * config.max_num_requests + 1
    return max(min(wanted, budget.pages_within(fraction)), one_sequence)

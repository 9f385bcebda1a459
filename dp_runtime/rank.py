"""From a plan to a rank that can step: first its weights, then its place among the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from dp_runtime.attention import KvScales, make_backend
from dp_runtime.config import EngineConfig
from dp_runtime.coordinator import Padding, StepCoordinator, measure_padding_cost
from dp_runtime.errors import require
from dp_runtime.kv_cache import allocate_pools
from dp_runtime.loader import WeightSource, open_weights
from dp_runtime.models import Model, build_model
from dp_runtime.padding import PaddingMode
from dp_runtime.program import Slot
from dp_runtime.protocols import RowCollective, StepBoard
from dp_runtime.sampling import Sampler
from dp_runtime.scheduler import Scheduler
from dp_runtime.sizing import RankPlan
from dp_runtime.status import ModelInfo
from dp_runtime.step import StepLoop
from dp_runtime.trace import Recorder, Totals


@dataclass(frozen=True, eq=False)
class LoadedRank:
    """A rank's share of the model bound to its page pools, and what the driver should know."""

    model: Model
    info: ModelInfo


def load_rank(config: EngineConfig, plan: RankPlan, on_bytes: Callable[[int], None]) -> LoadedRank:
    """Allocate the pages and read this rank's weights; `on_bytes` hears of each slice."""
    started = monotonic()
    device, model = torch.device(plan.device), plan.model
    weights = open_weights(
        config.model, config.load_format, config.seed, plan.dtype, device, on_bytes
    )
    pools = allocate_pools(
        model.num_layers,
        plan.pages,
        model.num_kv_heads,
        model.head_dim,
        plan.attention.kv_dtype,
        device,
    )
    served = build_model(
        model,
        weights,
        plan.sharding,
        make_backend(plan.backend, plan.attention, pools, read_kv_scales(weights, plan)),
    )
    tokenizer = Path(config.model, "tokenizer.json")
    info = ModelInfo(
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        max_model_len=plan.limits.max_model_len,
        eos_token_ids=model.eos_token_ids,
        tokenizer_json=tokenizer.read_text() if tokenizer.exists() else None,
        cache_tokens=plan.cache_tokens,
        weight_bytes=plan.weight_bytes,
        bytes_read=weights.bytes_read,
        load_s=monotonic() - started,
    )
    return LoadedRank(served, info)


def read_kv_scales(weights: WeightSource, plan: RankPlan) -> list[KvScales]:
    """The scales of a quantised KV cache, [layer]; 1.0 where the checkpoint has none.

    Their names are those that vLLM and SGLang read: of the attention module, or of its k_proj and
    v_proj (ModelOpt). Raises ValueError for a scale that is not a positive number.
    """
    if not plan.attention.quantized:
        return [KvScales()] * plan.model.num_layers
    scales = []
    for layer in range(plan.model.num_layers):
        prefix = f"model.layers.{layer}.self_attn"
        k, v = (_scale(weights, prefix, part) for part in "kv")
        scales.append(KvScales(k, v))
    return scales


def _scale(weights: WeightSource, prefix: str, part: str) -> float:
    for name in (f"{prefix}.{part}_scale", f"{prefix}.{part}_proj.{part}_scale"):
        value = weights.scalar(name)
        if value is not None:
            require(0 < value < math.inf, name, value, "a positive number")
            return value
    return 1.0


def assemble(
    config: EngineConfig,
    plan: RankPlan,
    loaded: LoadedRank,
    board: StepBoard,
    collective: RowCollective,
) -> StepLoop:
    """Put the step loop of a loaded rank together; all ranks do so at the same time."""
    device, model = torch.device(plan.device), plan.model
    mode = PaddingMode(config.padding)
    cost = (
        measure_padding_cost(collective, model.hidden_size, plan.dtype, device)
        if mode is PaddingMode.AUTO
        else None
    )
    return StepLoop(
        Scheduler(plan.pages, plan.limits),
        StepCoordinator(board, collective, Padding(mode, cost, config.poison_padding)),
        {Slot.TARGET: loaded.model},
        Sampler(model.vocab_size, device),
        Recorder(Totals(plan.sharding.dp_rank)),
        device,
        config.depth,
    )

"""From a plan to a rank that can step: first its weights, then its place among the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from dp_runtime.attention import KvScales, kernels, make_backend
from dp_runtime.config import EngineConfig
from dp_runtime.coordinator import Padding, StepCoordinator, measure_padding_cost
from dp_runtime.device_memory import free_bytes
from dp_runtime.errors import StartError, require
from dp_runtime.graph_buckets import GraphBuckets, StageBuckets
from dp_runtime.graphs import DecodeGraphs
from dp_runtime.kernel_builds import Kernel
from dp_runtime.kv_cache import allocate_pools
from dp_runtime.layers.exchange import counts_on_device
from dp_runtime.loader import WeightSource, open_weights
from dp_runtime.memory import MemoryUse
from dp_runtime.models import Model, build_model
from dp_runtime.padding import PaddingMode
from dp_runtime.profiling import run_largest_steps
from dp_runtime.program import Slot
from dp_runtime.protocols import RowCollective, StepBoard
from dp_runtime.sampling import Sampler
from dp_runtime.scheduler import Scheduler
from dp_runtime.sizing import RankPlan
from dp_runtime.stage_graphs import StageGraphs
from dp_runtime.status import GraphUse, ModelInfo
from dp_runtime.step import StepLoop
from dp_runtime.trace import Recorder, Totals


@dataclass(frozen=True, eq=False)
class LoadedRank:
    """A rank's share of the model bound to its page pools, and what the driver should know."""

    model: Model
    pools: Sequence[Tensor]  # [layer]
    info: ModelInfo
    load_s: float
    held: MemoryUse | None  # measured, without activations; None on a CPU


def load_rank(config: EngineConfig, plan: RankPlan, on_bytes: Callable[[int], None]) -> LoadedRank:
    """Allocate the pages and read this rank's weights; `on_bytes` hears of each slice.

    Raises StartError if a GPU's free memory does not hold what was planned.
    """
    started = monotonic()
    device, model = torch.device(plan.device), plan.model
    if device.type == "cuda":
        check_free(plan, free_bytes(plan.device))
    allocated = [_allocated(device)]
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
    allocated.append(_allocated(device))
    backends = make_backend(plan.backend, plan.attention, pools, read_kv_scales(weights, plan))
    allocated.append(_allocated(device))
    served = build_model(model, weights, plan.sharding, backends, plan.moe_backend)
    allocated.append(_allocated(device))
    tokenizer = Path(config.model, "tokenizer.json")
    info = ModelInfo(
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        max_model_len=plan.limits.max_model_len,
        eos_token_ids=model.eos_token_ids,
        tokenizer_json=tokenizer.read_text() if tokenizer.exists() else None,
        cache_tokens=plan.cache_tokens,
        bytes_read=weights.bytes_read,
    )
    kv_cache, workspaces, held = (after - before for before, after in pairwise(allocated))
    use = MemoryUse(held, workspaces, 0, kv_cache) if device.type == "cuda" else None
    return LoadedRank(served, pools, info, monotonic() - started, use)


def check_free(plan: RankPlan, free: int) -> None:
    """StartError if what is planned is more than `free` bytes."""
    use, gib = plan.memory, 2**30
    if use.total <= free:
        return
    raise StartError(
        f"rank {plan.sharding.dp_rank}: {plan.device} has {free / gib:.1f} GiB free and "
        f"{use.total / gib:.1f} GiB are planned: weights {use.weights / gib:.1f}, workspaces "
        f"{use.workspaces / gib:.1f}, activations {use.activations / gib:.1f}, "
        f"{plan.pages.num_pages} KV pages {use.kv_cache / gib:.1f}; end other processes on this "
        "GPU, or lower kv_memory_fraction or num_pages"
    )


def _allocated(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process has allocated."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


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


def kernels_of(plan: RankPlan) -> tuple[Kernel, ...]:
    """All that is compiled before a plan can be served."""
    attention = kernels(plan.backend, plan.attention, torch.device(plan.device))
    return (*attention, *_moe_kernels(plan))


def _moe_kernels(plan: RankPlan) -> tuple[Kernel, ...]:
    if plan.moe_backend != "triton":
        return ()
    from dp_runtime.layers.triton_modules import modules

    model = plan.model
    shard = plan.sharding.shard(model.num_experts, model.moe_intermediate_size)
    ranks = plan.sharding.dp_size
    most = plan.limits.max_num_tokens * ranks
    return modules(model, shard, ranks, most, plan.dtype, torch.device(plan.device))


def capture(
    plan: RankPlan,
    loop: StepLoop,
    buckets: GraphBuckets,
    poison: bool,
    on_captured: Callable[[int, int], None],
) -> GraphUse:
    """Capture the graphs of a rank, with all others; the loop then replays them."""
    started, free = monotonic(), free_bytes(plan.device)
    pages, model, collective = plan.pages, loop.models[Slot.TARGET], loop.coordinator.collective
    table_pages = -(-plan.limits.max_model_len // pages.page_size)
    graphs = DecodeGraphs(model, pages, table_pages, collective, buckets, poison, loop.device)
    alone = model.num_moe_layers > 0 and counts_on_device(collective)
    sizes = StageBuckets.of(plan.limits.max_num_tokens) if alone else StageBuckets.none()
    stages = StageGraphs(model, collective, sizes, poison, loop.device)
    total = graphs.count + stages.count
    try:
        graphs.capture(lambda done: on_captured(done, total))
        stages.capture(lambda done: on_captured(graphs.count + done, total))
    except BaseException as error:
        loop.coordinator.abort(f"{type(error).__name__}: {error}")
        raise
    loop.use_graphs(Slot.TARGET, graphs, stages)
    return GraphUse(total, monotonic() - started, free - free_bytes(plan.device))


def profile(loop: StepLoop, loaded: LoadedRank) -> MemoryUse:
    """Run the largest steps on a GPU rank, with all others, and return what it uses; see there.

    What stays allocated after them counts as workspace: cuBLAS's, and what kernels keep.
    """
    assert loaded.held is not None, "a GPU rank has measured what it loaded"
    device = loop.device
    before = _allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run_largest_steps(loop, loaded.pools)
        torch.cuda.synchronize(device)
    except BaseException as error:
        loop.coordinator.abort(f"{type(error).__name__}: {error}")
        raise
    after = _allocated(device)
    return replace(
        loaded.held,
        workspaces=loaded.held.workspaces + after - before,
        activations=torch.cuda.max_memory_allocated(device) - after,
    )

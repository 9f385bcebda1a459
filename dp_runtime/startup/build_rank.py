"""From a plan to a rank that can step: first its weights, then its place among the others."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic

import torch

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.attention.registry import CHOSEN, backend_class
from dp_runtime.attention.spec import KvScales
from dp_runtime.config import EngineConfig
from dp_runtime.core.cache_spec import LayerCaches, LayerState
from dp_runtime.errors import StartError, require
from dp_runtime.flight.recorder import FlightRecorder
from dp_runtime.flight.ring import FlightRing, RingLayout
from dp_runtime.host.memory_address import MemoryAddress
from dp_runtime.layers.routing_buffer import RoutingBuffer
from dp_runtime.metrics.status import ModelInfo
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.execution_plan import ExecutionPolicy
from dp_runtime.parallel.step_board import StepBoard
from dp_runtime.parallel.step_coordinator import StepCoordinator
from dp_runtime.runner.drafting import Drafting
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.runner.step_runner import StepRunner
from dp_runtime.sampling.draft_verification import ForcedAcceptance
from dp_runtime.startup.device_memory import allocated_bytes, free_bytes
from dp_runtime.startup.loaded_rank import KeptCaches, LoadedRank
from dp_runtime.startup.rank_plan import RankPlan
from dp_runtime.startup.served_models import ServedModels
from dp_runtime.startup.served_requests import ServedRequests
from dp_runtime.startup.step_policies import StepPolicies
from dp_runtime.weights.chat_files import read_chat_files
from dp_runtime.weights.files import is_present, read_text
from dp_runtime.weights.kept_weights import KeptWeights
from dp_runtime.weights.loader import open_weights
from dp_runtime.weights.sampling_defaults import read_sampling_defaults
from dp_runtime.weights.source import WeightSource

logger = logging.getLogger(__name__)


def load_rank(
    config: EngineConfig,
    plan: RankPlan,
    on_bytes: Callable[[int], None],
    copy: MemoryAddress | None = None,
) -> LoadedRank:
    """Allocate the pages and load this rank's weights; StartError if memory is not free.

    copy: where a rank before this one has left its weights, or this one leaves them.
    """
    log_choices(plan)
    with KeptWeights(copy, str(plan.sharding), plan.load_bytes) as kept:
        rank = _load(config, plan, on_bytes, kept)
        logger.info("rank %d: weights %s, in %.2f s", plan.dp_rank, kept.finish(), rank.load_s)
    return rank


def _load(
    config: EngineConfig, plan: RankPlan, on_bytes: Callable[[int], None], kept: KeptWeights
) -> LoadedRank:
    started = monotonic()
    device, model = torch.device(plan.device), plan.model
    chat = read_chat_files(config.model)
    if device.type == "cuda":
        check_free(plan, free_bytes(plan.device))
    allocated_before = allocated_bytes(device)
    sources = kept.sources(
        lambda: _open_weights(config, plan, on_bytes),
        len(plan.layers), device, plan.dtype, on_bytes, plan.dense.few_rows_kernel,
    )  # fmt: skip
    slots = plan.limits.num_state_slots
    caches = [
        LayerCaches.allocate(layers.caches, plan.pages, slots, device) for layers in plan.layers
    ]
    scales: list[Sequence[KvScales]] = [read_kv_scales(sources[0], plan), ()]  # a draft has none
    backends = [
        backend_class(plan.backend)(layers.attention, own.pools, own_scales)
        for layers, own, own_scales in zip(plan.layers, caches, scales)
    ]
    states = caches[0].states
    models = _build_models(plan, sources, backends, states)
    tokenizer = Path(config.model, "tokenizer.json")
    info = ModelInfo(
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        max_model_len=plan.limits.max_model_len,
        eos_token_ids=model.eos_token_ids,
        tokenizer_json=read_text(tokenizer) if is_present(tokenizer) else None,
        cache_tokens=plan.cache_tokens,
        bytes_read=sum(source.bytes_read for source in sources),
        chat=chat,
        sampling_defaults=read_sampling_defaults(config.model),
        routing=plan.routing,
        caches_prefixes=plan.prefix_cache.hasher is not None,
        keeps_state=plan.limits.keeps_state,
        images=plan.images,
    )
    pools = [pool for own in caches for pool in own.pools if pool is not None]
    load_s = monotonic() - started
    return LoadedRank(models, backends, pools, states, info, load_s, allocated_before)


def reload_rank(
    config: EngineConfig, plan: RankPlan, kept: KeptCaches, on_bytes: Callable[[int], None]
) -> LoadedRank:
    """Read the weights of another sharding, for the caches that a rank has."""
    started, sources = monotonic(), _open_weights(config, plan, on_bytes)
    models = _build_models(plan, sources, kept.backends, kept.states)
    info = replace(kept.info, bytes_read=sum(source.bytes_read for source in sources))
    load_s = monotonic() - started
    own = kept.backends, kept.pools, kept.states
    return LoadedRank(models, *own, info, load_s, kept.allocated_before)


def _build_models(
    plan: RankPlan,
    sources: Sequence[WeightSource],
    backends: Sequence[AttentionBackend],
    states: Sequence[LayerState],
) -> ServedModels:
    own = sources, backends, states, plan.sharding, plan.moe_backend
    return ServedModels.build(plan.model, plan.draft, *own)


def _open_weights(
    config: EngineConfig, plan: RankPlan, on_bytes: Callable[[int], None]
) -> list[WeightSource]:  # of the model, then of its draft
    draft = [] if plan.draft is None else [plan.draft.directory]
    format_, seed, device = config.load_format, config.seed, torch.device(plan.device)
    dense = plan.dense.kept, plan.dense.few_rows_kernel
    return [
        open_weights(directory, format_, seed, plan.dtype, device, on_bytes, *dense)
        for directory in (config.model, *draft)
    ]


def log_choices(plan: RankPlan) -> None:
    """Log what runs and why, once for all ranks, and this rank's memory."""
    if plan.sharding.position == 0:
        _log_attention(plan)
        logger.info("MoE backend %s: %s", plan.moe_backend, plan.moe_reason)
        if plan.dense.is_notable:
            logger.info("dense backend %s: %s", plan.dense.backend, plan.dense.reason)
            _log_widened(plan)
        _log_recurrent(plan)
        logger.info("CUDA graphs %s: %s", "on" if plan.graphs else "off", plan.graphs_reason)
        prefixes = plan.prefix_cache
        logger.info("prefix cache %s: %s", "on" if prefixes.hasher else "off", prefixes.reason)
    use, gib = plan.memory, 2**30
    if use.recurrent_state:
        requests, state = plan.limits.max_num_requests, use.recurrent_state / gib
        logger.info("recurrent state of %d requests, %.2f GiB", requests, state)
    if plan.images is not None:
        slots, features = plan.limits.num_image_slots, use.image_features / gib
        logger.info("features of %d tokens of images, %.2f GiB", slots, features)
    logger.info(
        "%d KV pages of %d tokens, %.2f GiB; weights %.2f, workspaces %.2f, activations %.2f GiB",
        plan.pages.num_pages, plan.pages.page_size, use.kv_cache / gib,
        use.weights / gib, use.workspaces / gib, use.activations / gib,
    )  # fmt: skip


def _log_attention(plan: RankPlan) -> None:
    backend, reason, device = plan.backend, plan.backend_reason, plan.device
    if backend == "torch_ref" and device != "cpu" and reason != CHOSEN:
        logger.warning("attention backend %s is slow on %s: %s", backend, device, reason)
    else:
        logger.info("attention backend %s: %s", backend, reason)


def _log_widened(plan: RankPlan) -> None:
    found: dict[tuple[str, str], int] = defaultdict(int)
    for each in plan.dense.widened:
        found[re.sub(r"\.\d+\.", ".*.", each.name), each.why] += each.num_bytes
    for (name, why), num_bytes in found.items():
        taken = num_bytes / 2**20
        logger.warning("%s is e4m3, and widened to %.1f MiB: %s", name, taken, why)


def _log_recurrent(plan: RankPlan) -> None:
    if not plan.slot_bytes:
        return
    if plan.device == "cpu":
        logger.info("recurrent layers run in torch: there is no kernel for device cpu")
    else:
        logger.info("recurrent layers run in Triton kernels")


def check_free(plan: RankPlan, free: int) -> None:
    use, gib = plan.memory, 2**30
    if use.total <= free:
        return
    state = f", recurrent state {use.recurrent_state / gib:.1f}" if use.recurrent_state else ""
    state += f", image features {use.image_features / gib:.1f}" if use.image_features else ""
    raise StartError(
        f"rank {plan.dp_rank}: {plan.device} has {free / gib:.1f} GiB free and "
        f"{use.total / gib:.1f} GiB are planned: weights {use.weights / gib:.1f}, workspaces "
        f"{use.workspaces / gib:.1f}, activations {use.activations / gib:.1f}, "
        f"{plan.pages.num_pages} KV pages {use.kv_cache / gib:.1f}{state}; end other processes on "
        "this GPU, or lower kv_memory_fraction or num_pages"
    )


def read_kv_scales(weights: WeightSource, plan: RankPlan) -> list[KvScales]:
    """Read the scales of a quantised KV cache, [layer]; 1.0 where the checkpoint has none."""
    if not plan.attention.quantized:
        return [KvScales()] * plan.model.num_layers
    scales = []
    for layer in range(plan.model.num_layers):
        k, v = (_scale(weights, layer, part) for part in "kv")
        scales.append(KvScales(k, v))
    return scales


def _scale(weights: WeightSource, layer: int, part: str) -> float:
    names = [
        f"{root}.layers.{layer}.self_attn.{name}_scale"
        for root in ("model", "model.language_model")
        for name in (part, f"{part}_proj.{part}")  # as vLLM and SGLang read them
    ]
    found = {name: scale for name in names if (scale := weights.scalar(name)) is not None}
    value = next(iter(found.values()), 1.0)
    for name, scale in found.items():
        require(0 < scale < math.inf, name, scale, "a positive number")
        require(scale == value, name, scale, f"{names[0]} is {value:g}")
    return value


def assemble(
    config: EngineConfig,
    plan: RankPlan,
    loaded: LoadedRank,
    board: StepBoard,
    collective: RowCollective,
    flight: FlightRecorder,
    epoch: int = 0,
    served: ServedRequests | None = None,
) -> StepLoop:
    """Put the step loop of a loaded rank together; all ranks do so at the same time.

    `served` are requests that an earlier epoch has begun.
    """
    policies = StepPolicies.of(config, plan, collective)
    coordinator = StepCoordinator(
        board, collective, ExecutionPolicy(policies.padding), epoch=epoch, members=plan.members,
        programs=config.programs, policy=policies.program, budget=policies.budget,
    )  # fmt: skip
    served = served or ServedRequests.none(plan, loaded)
    routing = None
    if plan.routing is not None:
        size, position = plan.limits.max_num_tokens, plan.sharding.position
        routing = RoutingBuffer(plan.routing, size, position, torch.device(plan.device))
    runner = StepRunner(
        loaded.models.target_keeping(routing),
        _drafting(config, loaded, served),
        served.sampler,
        served.structured,
        collective=collective,
        pages=plan.pages,
        num_state_slots=plan.limits.num_state_slots,
        states=loaded.states,
        device=torch.device(plan.device),
        poison=config.poison_padding,
        flight=flight,
        routing=routing,
        images=served.image_encoding(plan, loaded),
    )
    return StepLoop(served.scheduler, coordinator, runner, served.recorder, plan.depth)


def _drafting(config: EngineConfig, loaded: LoadedRank, served: ServedRequests) -> Drafting | None:
    if loaded.models.draft is None or served.drafts is None:
        return None
    mean_tokens = config.speculative_forced_tokens
    forced = None if mean_tokens is None else ForcedAcceptance(mean_tokens)
    return Drafting(loaded.models.draft, forced, served.drafts)


def new_flight(config: EngineConfig, plan: RankPlan) -> FlightRecorder:
    """Make a rank's flight recorder, with room for the collectives of the longest program."""
    num_passes = max(len(program.passes) for program in config.programs)
    draft_layers = 0 if plan.draft is None else len(plan.layers[1].caches)
    stages = plan.model.num_moe_layers + (num_passes - 1) * draft_layers
    layout = RingLayout(plan.members.size, num_passes, max(1, 2 * stages))
    own_process = config.launcher != "thread"
    make = FlightRing.shared if own_process else FlightRing.in_process
    return FlightRecorder(make(layout, plan.dp_rank))

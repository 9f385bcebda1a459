"""RankPlan: what a rank runs and how many bytes it takes, for `inspect` and for the rank alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from dp_runtime.attention.registry import choose_backend
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.config import EngineConfig
from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.cache_spec import CacheSpec, LayerCaches, page_bytes, slot_bytes
from dp_runtime.core.membership import Membership
from dp_runtime.core.request import ImageFormat, RoutingShape
from dp_runtime.errors import require
from dp_runtime.layers.moe import RankSharding
from dp_runtime.layers.moe_kernels import choose_moe_backend
from dp_runtime.metrics.memory import MemoryUse
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.image_format import read_image_format
from dp_runtime.models.registry import read_model_config
from dp_runtime.scheduler.limits import Limits, default_checkpoints
from dp_runtime.speculative.draft import DraftConfig, read_draft_config
from dp_runtime.startup.execution_choices import (
    DenseChoice,
    PrefixChoice,
    choose_dense,
    choose_depth,
    choose_graphs,
    choose_prefix_cache,
    resolve_dtype,
)
from dp_runtime.startup.memory_estimate import param_bytes
from dp_runtime.startup.memory_plan import MemoryNeeds, plan_memory
from dp_runtime.startup.served_models import ServedModels
from dp_runtime.weights.dummy import MetaWeights
from dp_runtime.weights.fp8_blocks import BLOCK


@dataclass(frozen=True)
class LayerPlan:
    """The attention of a model's layers, and the caches that the model lists, [layer]."""

    attention: AttentionSpec
    caches: tuple[CacheSpec, ...]


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Everything that follows from a config, a model and a device, for one rank."""

    dp_rank: int
    members: Membership  # over which experts are split
    model: ModelConfig
    draft: DraftConfig | None
    layers: tuple[LayerPlan, ...]  # of the model, then of its draft: both use the same page ids
    device: str
    dtype: torch.dtype
    backend: str
    backend_reason: str
    moe_backend: str
    moe_reason: str
    dense: DenseChoice
    graphs: bool  # decode steps are captured
    graphs_reason: str
    depth: int  # steps that may be uncommitted when the next is scheduled
    prefix_cache: PrefixChoice
    sharding: RankSharding
    limits: Limits
    images: ImageFormat | None  # None: the model takes none
    pages: PageGeometry
    load_bytes: int
    routing: RoutingShape | None  # if the experts that tokens went to are returned
    memory: MemoryUse
    shortage: str  # of memory, in one line; empty if it is enough

    @property
    def attention(self) -> AttentionSpec:
        return self.layers[0].attention

    @property
    def page_bytes(self) -> int:
        return page_bytes(_caches(self.layers))

    @property
    def slot_bytes(self) -> int:
        return slot_bytes(_caches(self.layers))

    @property
    def cache_tokens(self) -> int:
        return (self.pages.num_pages - 1) * self.pages.page_size


def _caches(layers: Sequence[LayerPlan]) -> list[CacheSpec]:
    return [cache for plan in layers for cache in plan.caches]


def plan_rank(
    config: EngineConfig, dp_rank: int, device: str, members: Membership | None = None
) -> RankPlan:
    """Decide what a rank runs on "cpu" or "cuda:i"; ValueError, with the fix, if it can't fit."""
    plan = sketch_rank(config, dp_rank, device, members)
    if plan.shortage:
        raise ValueError(plan.shortage)
    return plan


def sketch_rank(
    config: EngineConfig, dp_rank: int, device: str, members: Membership | None = None
) -> RankPlan:
    """Decide it without a look at whether the memory is enough: `shortage` says what is missing.

    members: the ranks that share the experts, if they are not those that the engine starts with.
    """
    members = members or Membership.first(config.dp_size)
    model, images = _read_model(config)
    dtype, torch_device = resolve_dtype(config.dtype, device), torch.device(device)
    attention, draft = attention_spec(config, model, dtype), read_draft(config, model)
    keeps_state, fp8 = _keeps_state(model, attention), any(model.fp8_experts)
    layers = plan_layers(attention, model, draft, config.speculative_num_steps)
    backend, reason = choose_backend(config.attention_backend, attention, torch_device)
    for plan in layers[1:]:
        choose_backend(backend, plan.attention, torch_device)
    sharding = RankSharding(config.moe_sharding, members.position(dp_rank), members.size)
    _check_blocks(config, model, members.size)
    moe_backend, moe_reason = choose_moe_backend(config.moe_backend, dtype, torch_device, fp8)
    limits = _limits(config, model, images, keeps_state)
    routing = _routing(config, model, moe_backend)
    graphs, graphs_reason = choose_graphs(config, device, backend, moe_backend)
    dense = choose_dense(config, model, draft, dtype, torch_device)
    meta = partial(MetaWeights, dtype, torch_device, dense.kept, dense.few_rows_kernel)
    build = partial(_models_without_memory, model, draft, layers, moe_backend=moe_backend)
    models = build(weights := meta(), sharding)
    needs = MemoryNeeds(
        device=device,
        models=models,
        set_aside=_set_aside(config, models, sharding, partial(build, meta())),
        limits=limits,
        backend=backend,
        attention=[plan.attention for plan in layers],
        page_bytes=page_bytes(_caches(layers)),
        slot_bytes=slot_bytes(_caches(layers)),
        graphs=graphs,
        dp_size=members.size,
        host_copy=weights.bytes_read if config.host_weights else 0,
        routing_bytes=0 if routing is None else limits.max_num_tokens * routing.token_bytes,
    )
    memory = plan_memory(config, needs)
    return RankPlan(
        dp_rank=dp_rank, members=members, model=model, draft=draft, layers=layers,
        device=device, dtype=dtype, limits=limits, backend=backend, backend_reason=reason,
        moe_backend=moe_backend, moe_reason=moe_reason, dense=dense.built(models),
        depth=choose_depth(config, device, backend),
        graphs=graphs, graphs_reason=graphs_reason, sharding=sharding, routing=routing,
        prefix_cache=choose_prefix_cache(config, keeps_state), images=images, pages=memory.pages,
        load_bytes=weights.bytes_read, memory=memory.use, shortage=memory.shortage,
    )  # fmt: skip


def _keeps_state(model: ModelConfig, attention: AttentionSpec) -> bool:
    """Tell if layers are recurrent."""
    dtypes = attention.kv_dtype, attention.dtype
    return slot_bytes(model.cache_specs(attention.page_size, *dtypes)) > 0


def _routing(config: EngineConfig, model: ModelConfig, moe_backend: str) -> RoutingShape | None:
    if not config.enable_return_routed_experts:
        return None
    layers = model.num_moe_layers
    none = "false for a model without layers of experts"
    require(layers > 0, "enable_return_routed_experts", True, none)
    replays = moe_backend == "torch" and model.num_experts <= 2**15
    return RoutingShape(layers, model.num_experts_per_tok, model.num_experts, replays)


def _read_model(config: EngineConfig) -> tuple[ModelConfig, ImageFormat | None]:
    model = read_model_config(config.model)
    if config.language_model_only or model.vision is None:
        return replace(model, vision=None), None
    return model, read_image_format(config.model, model.vision, config.max_image_pixels)


def _limits(
    config: EngineConfig, model: ModelConfig, images: ImageFormat | None, keeps_state: bool
) -> Limits:
    caches_states = keeps_state and config.prefix_caching
    checkpoints = config.num_state_checkpoints or default_checkpoints(config.max_num_requests)
    pages = -(-config.state_track_interval // config.page_size)
    limits = Limits(
        config.max_num_requests,
        config.max_num_tokens,
        model.resolve_max_model_len(config.max_model_len),
        config.speculative_num_steps,
        keeps_state,
        num_state_checkpoints=checkpoints if caches_states else 0,
        state_track_interval=(
            pages * config.page_size if config.prefix_state_strategy == "extra_buffer" else 0
        ),
    )
    if images is None:
        return limits
    largest = min(images.max_tokens, limits.max_model_len - 1)
    num_slots = config.image_cache_tokens or 2 * largest + limits.max_num_tokens
    require(
        num_slots >= 2 * largest, "image_cache_tokens", num_slots,
        f"at least {2 * largest}: two of the largest image; or lower max_image_pixels",
    )  # fmt: skip
    return replace(limits, max_image_tokens=largest, num_image_slots=num_slots)


def _set_aside(
    config: EngineConfig,
    models: ServedModels,
    sharding: RankSharding,
    build: Callable[[RankSharding], ServedModels],
) -> int:
    """Count the bytes of weights that a rank takes over if only min_dp_size ranks are left."""
    fewest = min(config.min_dp_size or sharding.dp_size, sharding.dp_size)
    if fewest == sharding.dp_size:
        return 0
    largest = replace(sharding, position=fewest - 1, dp_size=fewest)
    return max(param_bytes(build(largest)) - param_bytes(models), 0)


def attention_spec(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> AttentionSpec:
    query_lens = {
        program.query_len(pass_kind) for program in config.programs for pass_kind in program.passes
    }
    quantized = config.kv_cache_dtype == "fp8_e4m3"
    return AttentionSpec(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        page_size=config.page_size,
        dtype=dtype,
        kv_dtype=torch.float8_e4m3fn if quantized else dtype,
        decode_query_lens=frozenset({1} | query_lens),
        check_device_values=config.check_device_values,
    )


def read_draft(config: EngineConfig, model: ModelConfig) -> DraftConfig | None:
    """Read the draft model's config, if any; ValueError if it does not fit the model."""
    if not config.speculative_num_steps:
        return None
    head, vocab = config.speculative_draft_model, config.speculative_draft_vocab
    return read_draft_config(config.model, model, head, vocab)


def plan_layers(
    attention: AttentionSpec, model: ModelConfig, draft: DraftConfig | None, max_drafts: int
) -> tuple[LayerPlan, ...]:
    size, dtypes = attention.page_size, (attention.kv_dtype, attention.dtype)
    own = LayerPlan(attention, model.cache_specs(size, *dtypes, max_drafts))
    if draft is None:
        return (own,)
    heads = replace(
        attention,
        num_heads=draft.num_heads,
        num_kv_heads=draft.num_kv_heads,
        head_dim=draft.head_dim,
    )
    return own, LayerPlan(heads, draft.cache_specs(size, *dtypes))


def _models_without_memory(
    model: ModelConfig,
    draft: DraftConfig | None,
    layers: Sequence[LayerPlan],
    weights: MetaWeights,
    sharding: RankSharding,
    *,
    moe_backend: str,
) -> ServedModels:
    """Build a rank's models on the meta device, over caches without a page or a slot."""
    meta, no_pages = torch.device("meta"), PageGeometry(0, layers[0].attention.page_size)
    empty = [LayerCaches.allocate(plan.caches, no_pages, 0, meta) for plan in layers]
    backends = [
        TorchRefBackend(plan.attention, caches.pools) for plan, caches in zip(layers, empty)
    ]
    sources, states = [weights] * len(layers), empty[0].states
    return ServedModels.build(model, draft, sources, backends, states, sharding, moe_backend)


def _check_blocks(config: EngineConfig, model: ModelConfig, dp_size: int) -> None:
    """Raise ValueError if ranks would cut through the blocks of e4m3 weights of one scale."""
    if config.moe_sharding != "tp" or not any(model.fp8_experts):
        return
    size = model.moe_intermediate_size
    require(
        size % (dp_size * BLOCK) == 0, "moe_sharding", "tp",
        f"ep for this model: its e4m3 experts have a scale for each {BLOCK} of "
        f"moe_intermediate_size {size}, which dp_size {dp_size} does not split into whole blocks",
    )  # fmt: skip

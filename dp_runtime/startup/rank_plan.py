"""RankPlan: what a rank would run, and how many bytes it takes; decided before any weight is read.

`inspect` prints it, and the rank that starts is built from the same value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dp_runtime.attention.registry import choose_backend, workspace_bytes
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.config import EngineConfig
from dp_runtime.core.metadata import AttentionMetadata, PageGeometry
from dp_runtime.core.rotation import QkNormRope
from dp_runtime.errors import require
from dp_runtime.layers.moe import RankSharding
from dp_runtime.layers.moe_kernels import choose_moe_backend
from dp_runtime.metrics.memory import MemoryUse
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.registry import read_model_config
from dp_runtime.parallel.transports import choose_transport
from dp_runtime.scheduler.limits import Limits
from dp_runtime.speculative.draft import DraftConfig, read_draft_config
from dp_runtime.startup.device_memory import CUBLAS_BYTES, rank_memory
from dp_runtime.startup.memory_estimate import activation_peak, captured_bytes, param_bytes
from dp_runtime.startup.served_models import ServedModels
from dp_runtime.weights.fp8_blocks import BLOCK
from dp_runtime.weights.generated import MetaWeights

KV_MEMORY_FRACTION = {"cpu": 0.5, "cuda": 0.9}  # by device, where the config has none


@dataclass(frozen=True)
class DraftPlan:
    """The draft model of a rank; its layers have pages of their own under the same numbers."""

    config: DraftConfig
    attention: AttentionSpec


@dataclass(frozen=True)
class RankPlan:
    """Everything that follows from a config, a model and a device, for one rank.

    load_bytes: what its share of the checkpoint takes in memory; memory.weights adds what is
    derived from it.
    """

    model: ModelConfig
    draft: DraftPlan | None
    device: str
    dtype: torch.dtype
    attention: AttentionSpec
    backend: str
    backend_reason: str
    moe_backend: str
    moe_reason: str
    graphs: bool  # decode steps are captured
    graphs_reason: str
    depth: int  # steps that may be uncommitted when the next is scheduled
    sharding: RankSharding
    limits: Limits
    pages: PageGeometry
    load_bytes: int
    memory: MemoryUse

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, K and V."""
        return sum(layers * layer_page_bytes(spec) for layers, spec in self.kv_layers)

    @property
    def draft_config(self) -> DraftConfig | None:
        return None if self.draft is None else self.draft.config

    @property
    def kv_layers(self) -> tuple[tuple[int, AttentionSpec], ...]:
        """How many layers of the model, and of its draft, have pages, and of what kind."""
        own = (self.model.num_layers, self.attention)
        if self.draft is None:
            return (own,)
        return own, (self.draft.config.num_layers, self.draft.attention)

    @property
    def cache_tokens(self) -> int:
        return (self.pages.num_pages - 1) * self.pages.page_size


def plan_rank(config: EngineConfig, dp_rank: int, device: str) -> RankPlan:
    """Decide what a rank runs on "cpu" or "cuda:i".

    Raises ValueError if the model, the lengths or the memory do not fit; the message has the fix.
    """
    model = read_model_config(config.model)
    dtype = resolve_dtype(config.dtype, device)
    attention = attention_spec(config, model, dtype)
    backend, reason = choose_backend(config.attention_backend, attention, torch.device(device))
    draft = plan_draft(config, model, attention)
    if draft is not None:
        choose_backend(backend, draft.attention, torch.device(device))
    sharding = RankSharding(config.moe_sharding, dp_rank, config.dp_size)
    fp8 = any(model.fp8_experts)
    if fp8 and config.moe_sharding == "tp":
        _check_blocks(model, config.dp_size)
    moe_backend, moe_reason = choose_moe_backend(
        config.moe_backend, dtype, torch.device(device), fp8
    )
    graphs, graphs_reason = choose_graphs(config, device, backend, moe_backend)
    plan = RankPlan(
        model=model,
        draft=draft,
        device=device,
        dtype=dtype,
        attention=attention,
        backend=backend,
        backend_reason=reason,
        moe_backend=moe_backend,
        moe_reason=moe_reason,
        graphs=graphs,
        graphs_reason=graphs_reason,
        depth=choose_depth(config, device, backend),
        sharding=sharding,
        limits=Limits(
            config.max_num_requests,
            config.max_num_tokens,
            model.resolve_max_model_len(config.max_model_len),
            config.speculative_num_steps,
        ),
        pages=PageGeometry(0, config.page_size),
        load_bytes=0,
        memory=MemoryUse(0, 0, 0, 0),
    )
    return _with_memory(plan, config)


def _with_memory(plan: RankPlan, config: EngineConfig) -> RankPlan:
    """The plan with what it takes in memory, and with the pages that the rest is good for."""
    weights, device = MetaWeights(plan.dtype), plan.device
    kinds = len(plan.kv_layers)
    models = ServedModels.build(
        plan.model, plan.draft_config, [weights] * kinds, [_NoAttention] * kinds, plan.sharding,
        plan.moe_backend,
    )  # fmt: skip
    limits, size = plan.limits, config.dp_size
    cublas = 0 if device == "cpu" else CUBLAS_BYTES
    memory = MemoryUse(
        weights=param_bytes(models),
        workspaces=cublas + sum(workspace_bytes(plan.backend, spec) for _, spec in plan.kv_layers),
        activations=activation_peak(models, limits, size, config.padding != "ragged"),
        kv_cache=0,
    )
    exchanged = size * limits.max_num_tokens * plan.model.hidden_size * plan.dtype.itemsize
    buffers = 2 * exchanged if device != "cpu" and size > 1 else 0
    captured = captured_bytes(models, limits, size) if plan.graphs else 0
    used = memory.total + buffers + captured
    pages = _page_geometry(config, device, limits.max_cached_len, plan.page_bytes, used)
    return replace(
        plan,
        pages=pages,
        load_bytes=weights.bytes_read,
        memory=replace(memory, kv_cache=pages.num_pages * plan.page_bytes),
    )


def plan_draft(
    config: EngineConfig, model: ModelConfig, attention: AttentionSpec
) -> DraftPlan | None:
    """What drafts for a model, if anything does; ValueError if it does not fit the model."""
    if not config.speculative_num_steps:
        return None
    draft = read_draft_config(config.model, model, config.speculative_draft_model)
    heads = replace(
        attention,
        num_heads=draft.num_heads,
        num_kv_heads=draft.num_kv_heads,
        head_dim=draft.head_dim,
    )
    return DraftPlan(draft, heads)


def _check_blocks(model: ModelConfig, dp_size: int) -> None:
    """ValueError if ranks would cut through the blocks of e4m3 weights that have one scale."""
    size = model.moe_intermediate_size
    require(
        size % (dp_size * BLOCK) == 0, "moe_sharding", "tp",
        f"ep for this model: its e4m3 experts have a scale for each {BLOCK} of "
        f"moe_intermediate_size {size}, which dp_size {dp_size} does not split into whole blocks",
    )  # fmt: skip


def choose_graphs(
    config: EngineConfig, device: str, backend: str, moe_backend: str
) -> tuple[bool, str]:
    """Whether decode steps are captured, and why.

    Raises ValueError if the config asks for graphs that can't be captured.
    """
    transport = choose_transport(  # on several hosts auto takes another one that can be captured
        config.collective,
        "cuda",
        threads=config.launcher == "thread",
        shared_gpus=config.ranks_per_gpu > 1,
        one_host=True,
    )
    hindrances = {
        "device cpu has none": device == "cpu",
        "ranks that are threads meet on the host": transport.in_process,
        f"attention_backend {backend} plans each pass on the host": backend != "trtllm",
        f"moe_backend {moe_backend} reads sizes back to the host": moe_backend != "triton",
        "rows go through host memory": not (transport.capturable or transport.in_process),
        "check_device_values reads inputs back": config.check_device_values,
    }
    reasons = [reason for reason, holds in hindrances.items() if holds]
    if config.cuda_graphs is False:
        return False, "turned off in the configuration"
    if config.cuda_graphs and reasons:
        raise ValueError(f"cuda_graphs: True is not allowed; {'; '.join(reasons)}")
    return not reasons, "; ".join(reasons) or "all kernels in use can be captured"


def choose_depth(config: EngineConfig, device: str, backend: str) -> int:
    """Steps that may be launched and not yet committed when the next one is scheduled.

    Raises ValueError if the config asks for overlap that can't be had.
    """
    hindrances = {
        f"attention_backend {backend} plans each pass on the host": backend != "trtllm",
        "check_device_values compares with lengths that the host has": config.check_device_values,
    }
    reasons = [reason for reason, holds in hindrances.items() if holds]
    if not reasons or device == "cpu" or not config.speculative_num_steps:
        return config.depth
    if config.overlap:
        raise ValueError(f"overlap: True is not allowed with speculation; {'; '.join(reasons)}")
    return 0


@dataclass(frozen=True)
class _NoAttention:
    """Stands where a backend would: counting weights runs no forward."""

    layer: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        raise AssertionError(f"layer {self.layer} of a model that was only counted can't run")

    def attend_qkv(self, qkv: Tensor, rotation: QkNormRope, metadata: AttentionMetadata) -> Tensor:
        raise AssertionError(f"layer {self.layer} of a model that was only counted can't run")


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """The torch dtype of a config's; auto is float32 on a CPU and bfloat16 on a GPU."""
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    resolved = getattr(torch, dtype)
    assert isinstance(resolved, torch.dtype), f"{dtype} was checked by the config"
    return resolved


def attention_spec(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> AttentionSpec:
    """What the attention backend of a rank must serve, in all passes of its programs."""
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


def layer_page_bytes(spec: AttentionSpec) -> int:
    """Bytes of one page of one layer, K and V."""
    return 2 * spec.page_size * spec.num_kv_heads * spec.head_dim * spec.kv_dtype.itemsize


def _page_geometry(
    config: EngineConfig, device: str, length: int, one_page: int, used: int
) -> PageGeometry:
    """The pages asked for; else what the limits can use, within a fraction of what `used` leaves.

    NOTE: from the size of the memory, not from what happens to be free: every run of a rank, and
    `inspect`, come to the same number.
    """
    size = config.page_size
    memory = rank_memory(device, config.dp_size, config.ranks_per_gpu)
    one_sequence = -(-length // size) + 1
    drafts = config.speculative_num_steps
    sequence = f"max_model_len {length - drafts}" + (f" and {drafts} drafts" if drafts else "")
    if config.num_pages is not None:
        require(
            config.num_pages >= one_sequence, "num_pages", config.num_pages,
            f"at least {one_sequence}: {sequence} in pages of {size}, and the null page; or lower "
            "max_model_len",
        )  # fmt: skip
        most = max(memory - used, 0) // one_page
        require(
            config.num_pages <= most, "num_pages", config.num_pages,
            f"at most {most}: {one_page:,} bytes each in what {used:,} leave of {memory:,}",
        )  # fmt: skip
        return PageGeometry(config.num_pages, size)
    fraction = config.kv_memory_fraction or KV_MEMORY_FRACTION[torch.device(device).type]
    affordable = int((memory - used) * fraction // one_page)
    require(
        affordable >= one_sequence, "kv_memory_fraction", fraction,
        f"memory for {one_sequence} pages: {sequence} needs them and "
        f"{max(affordable, 0)} fit; lower max_model_len or raise kv_memory_fraction",
    )  # fmt: skip
    wanted = (one_sequence - 1) * config.max_num_requests + 1
    return PageGeometry(min(wanted, affordable), size)

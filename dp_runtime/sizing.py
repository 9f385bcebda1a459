"""RankPlan: what a rank would run, and how many bytes it takes; decided before any weight is read.

`inspect` prints it, and the rank that starts is built from the same value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dp_runtime.attention import AttentionSpec, choose_backend, workspace_bytes
from dp_runtime.config import EngineConfig
from dp_runtime.device_memory import CUBLAS_BYTES, rank_memory
from dp_runtime.errors import require
from dp_runtime.fp8_blocks import BLOCK
from dp_runtime.layers.moe_kernels import choose_moe_backend
from dp_runtime.layers.rotary import HeadRotation
from dp_runtime.loader import CountedWeights
from dp_runtime.memory import MemoryUse
from dp_runtime.metadata import AttentionMetadata, PageGeometry
from dp_runtime.models import ModelConfig, RankSharding, build_model, read_model_config
from dp_runtime.prediction import activation_peak, captured_bytes, held_bytes
from dp_runtime.scheduler import Limits

KV_MEMORY_FRACTION = {"cpu": 0.5, "cuda": 0.9}  # by device, where the config has none


@dataclass(frozen=True)
class RankPlan:
    """Everything that follows from a config, a model and a device, for one rank.

    load_bytes: what its share of the checkpoint takes in memory; memory.weights adds what is
    derived from it.
    """

    model: ModelConfig
    device: str
    dtype: torch.dtype
    attention: AttentionSpec
    backend: str
    backend_reason: str
    moe_backend: str
    moe_reason: str
    graphs: bool  # decode steps are captured
    graphs_reason: str
    sharding: RankSharding
    limits: Limits
    pages: PageGeometry
    load_bytes: int
    memory: MemoryUse

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, K and V."""
        return page_bytes(self.model, self.pages.page_size, self.attention.kv_dtype)

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
    sharding = RankSharding(config.moe_sharding, dp_rank, config.dp_size)
    fp8 = any(model.fp8_experts)
    if fp8 and config.moe_sharding == "tp":
        _check_blocks(model, config.dp_size)
    moe_backend, moe_reason = choose_moe_backend(
        config.moe_backend, dtype, torch.device(device), fp8
    )
    weights = CountedWeights(dtype)
    served = build_model(model, weights, sharding, _NoAttention, moe_backend)
    length = config.max_model_len or model.max_position_embeddings
    require(
        length <= model.max_position_embeddings, "max_model_len", length,
        f"the model has {model.max_position_embeddings} positions",
    )  # fmt: skip
    limits = Limits(config.max_num_requests, config.max_num_tokens, length)
    cublas = 0 if device == "cpu" else CUBLAS_BYTES
    memory = MemoryUse(
        weights=held_bytes(served),
        workspaces=workspace_bytes(backend, attention) + cublas,
        activations=activation_peak(served, limits, config.dp_size, config.padding != "ragged"),
        kv_cache=0,
    )
    one_page = page_bytes(model, config.page_size, attention.kv_dtype)
    exchanged = config.dp_size * config.max_num_tokens * model.hidden_size * dtype.itemsize
    buffers = 2 * exchanged if device != "cpu" and config.dp_size > 1 else 0
    graphs, graphs_reason = choose_graphs(config, device, backend, moe_backend)
    captured = captured_bytes(served, limits, config.dp_size) if graphs else 0
    pages = _page_geometry(config, device, length, one_page, memory.total + buffers + captured)
    return RankPlan(
        model=model,
        device=device,
        dtype=dtype,
        attention=attention,
        backend=backend,
        backend_reason=reason,
        moe_backend=moe_backend,
        moe_reason=moe_reason,
        graphs=graphs,
        graphs_reason=graphs_reason,
        sharding=sharding,
        limits=limits,
        pages=pages,
        load_bytes=weights.bytes_read,
        memory=replace(memory, kv_cache=pages.num_pages * one_page),
    )


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
    shares = config.collective == "auto" and config.ranks_per_gpu > 1
    hindrances = {
        "device cpu has none": device == "cpu",
        "ranks that are threads meet on the host": config.launcher == "thread",
        f"attention_backend {backend} plans each slot on the host": backend != "trtllm",
        f"moe_backend {moe_backend} reads sizes back to the host": moe_backend != "triton",
        "rows go through host memory": shares or config.collective == "shared_memory",
        "check_device_values reads inputs back": config.check_device_values,
    }
    reasons = [reason for reason, holds in hindrances.items() if holds]
    if config.cuda_graphs is False:
        return False, "turned off in the configuration"
    if config.cuda_graphs and reasons:
        raise ValueError(f"cuda_graphs: True is not allowed; {'; '.join(reasons)}")
    return not reasons, "; ".join(reasons) or "all kernels in use can be captured"


@dataclass(frozen=True)
class _NoAttention:
    """Stands where a backend would: counting weights runs no forward."""

    layer: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        raise AssertionError(f"layer {self.layer} of a model that was only counted can't run")

    def attend_qkv(
        self, qkv: Tensor, rotation: HeadRotation, metadata: AttentionMetadata
    ) -> Tensor:
        raise AssertionError(f"layer {self.layer} of a model that was only counted can't run")


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """The torch dtype of a config's; auto is float32 on a CPU and bfloat16 on a GPU."""
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    resolved = getattr(torch, dtype)
    assert isinstance(resolved, torch.dtype), f"{dtype} was checked by the config"
    return resolved


def attention_spec(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> AttentionSpec:
    """What the attention backend of a rank must serve."""
    quantized = config.kv_cache_dtype == "fp8_e4m3"
    return AttentionSpec(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        page_size=config.page_size,
        dtype=dtype,
        kv_dtype=torch.float8_e4m3fn if quantized else dtype,
        check_device_values=config.check_device_values,
    )


def page_bytes(model: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, K and V."""
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize
    return page_size * per_token


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
    if config.num_pages is not None:
        require(
            config.num_pages >= one_sequence, "num_pages", config.num_pages,
            f"at least {one_sequence}: max_model_len {length} in pages of {size}, and the null "
            "page; or lower max_model_len",
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
        f"memory for {one_sequence} pages: max_model_len {length} needs them and "
        f"{max(affordable, 0)} fit; lower max_model_len or raise kv_memory_fraction",
    )  # fmt: skip
    wanted = (one_sequence - 1) * config.max_num_requests + 1
    return PageGeometry(min(wanted, affordable), size)

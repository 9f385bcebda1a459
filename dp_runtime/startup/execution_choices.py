"""Choices of how a rank's steps are executed: their dtype, captured or not, overlapped or not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from dp_runtime.attention.registry import backend_class
from dp_runtime.config import EngineConfig
from dp_runtime.errors import not_allowed, require
from dp_runtime.kernels.dense_linear.measured import FewRowsTiles
from dp_runtime.layers.linear import Widened
from dp_runtime.layers.moe_kernels import make_moe_kernels
from dp_runtime.models.config import ModelConfig
from dp_runtime.parallel.transports import choose_transport
from dp_runtime.prefix_cache.page_hash import PageHasher
from dp_runtime.speculative.draft import DraftConfig
from dp_runtime.startup.memory_estimate import (
    Fp8Shape,
    few_rows_tiles,
    fp8_shapes,
    widened_matrices,
)
from dp_runtime.weights.fp8_names import Fp8Names


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    resolved = getattr(torch, dtype)
    assert isinstance(resolved, torch.dtype), f"{dtype} was checked by the config"
    return resolved


def choose_graphs(
    config: EngineConfig, device: str, backend: str, moe_backend: str
) -> tuple[bool, str]:
    """Decide whether decode steps are captured, and why; ValueError if they can't be but must."""
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
        **_host_plans(backend),
        f"moe_backend {moe_backend} reads sizes back to the host": not make_moe_kernels(
            moe_backend
        ).capturable,
        "rows go through host memory": not (transport.capturable or transport.in_process),
        "check_device_values reads inputs back": config.check_device_values,
    }
    reasons = [reason for reason, holds in hindrances.items() if holds]
    if config.cuda_graphs is False:
        return False, "turned off in the configuration"
    if config.cuda_graphs and reasons:
        raise not_allowed("cuda_graphs", True, f"None or False, as {'; '.join(reasons)}")
    return not reasons, "; ".join(reasons) or "all kernels in use can be captured"


def choose_depth(config: EngineConfig, device: str, backend: str) -> int:
    """Decide how many steps may be uncommitted in flight; ValueError if overlap can't be had."""
    hindrances = {
        **_host_plans(backend),
        "check_device_values compares with lengths that the host has": config.check_device_values,
    }
    reasons = [reason for reason, holds in hindrances.items() if holds]
    if not reasons or device == "cpu" or not config.speculative_num_steps:
        return config.depth
    if config.overlap:
        why = "; ".join(reasons)
        raise not_allowed("overlap", True, f"None or False with speculation, as {why}")
    return 0


def _host_plans(backend: str) -> dict[str, bool]:
    """Say if a plan needs exact lengths on the host, which graphs and overlapped steps lack."""
    plans_on_host = not backend_class(backend).capturable
    return {f"attention_backend {backend} plans each pass on the host": plans_on_host}


@dataclass(frozen=True)
class PrefixChoice:
    hasher: PageHasher | None  # of the pages that requests share; None: they share none
    reason: str
    is_followed: bool = False  # its KV events are wanted


def choose_prefix_cache(config: EngineConfig, keeps_state: bool) -> PrefixChoice:
    if not config.prefix_caching:
        return PrefixChoice(None, "prefix_caching is off")
    kept = "full pages and recurrent states stay" if keeps_state else "full pages stay"
    why, followed = f"{kept} for requests that begin alike", config.tells_kv_events
    return PrefixChoice(page_hasher(config), why, followed)


def page_hasher(config: EngineConfig) -> PageHasher:
    """Name pages by all of a configuration that decides what they hold, up to its rounding."""
    names = (
        "model", "dtype", "kv_cache_dtype", "load_format", "seed", "speculative_draft_model",
    )  # fmt: skip
    model = repr([getattr(config, name) for name in names])
    return PageHasher(config.page_size, model, covers_next=config.speculative_num_steps > 0)


@dataclass(frozen=True)
class DenseChoice:
    """What multiplies matrices beside the experts, and which of them stay e4m3 for it."""

    backend: str  # of those that are e4m3 in the checkpoint
    reason: str
    kept: Fp8Names = field(default_factory=Fp8Names, repr=False)
    widened: tuple[Widened, ...] = ()  # of those that were to be kept
    few_rows_kernel: bool = False  # others have the kernels that were measured to be faster
    fp8_shapes: tuple[Fp8Shape, ...] = ()  # of matrices that stay e4m3
    few_rows_tiles: tuple[FewRowsTiles, ...] = ()  # of others with kernels of ours

    @property
    def is_notable(self) -> bool:
        return self.reason != NO_E4M3 or bool(self.widened)

    def built(self, models: object) -> DenseChoice:
        """Add what was built; ValueError if kernels for e4m3 were chosen and no matrix stays so."""
        shapes, few, widened = fp8_shapes(models), few_rows_tiles(models), widened_matrices(models)
        allowed = "auto or torch: no matrix beside the experts can stay e4m3"
        require(bool(shapes) or self.backend != "triton", "dense_backend", self.backend, allowed)
        reason = self.reason
        if few:
            sizes = ", ".join(f"{tiles.outputs} x {tiles.inputs}" for tiles in few)
            reason += f"; few rows times {sizes} by a kernel that was faster than cuBLAS on an H200"
        found = replace(self, widened=widened, fp8_shapes=shapes, few_rows_tiles=few)
        return replace(found, reason=reason)


def choose_dense(
    config: EngineConfig,
    model: ModelConfig,
    draft: DraftConfig | None,
    dtype: torch.dtype,
    device: torch.device,
) -> DenseChoice:
    """Resolve dense_backend, and say why; ValueError if it can't serve device, dtype or model."""
    name = config.dense_backend
    if name == "triton":
        _check_triton_dense(model, dtype, device)
    few_rows = name != "torch" and _fits_few_rows(dtype, device)
    if model.fp8_exempt is None:
        return DenseChoice("torch", NO_E4M3, few_rows_kernel=few_rows)
    if name != "triton":
        why = SLOW_PROMPTS if name == "auto" and device.type == "cuda" else "e4m3 is widened"
        return DenseChoice("torch", why, few_rows_kernel=few_rows)
    directories = [config.model, *([] if draft is None else [draft.directory])]
    dummy = config.load_format == "dummy"
    kept = Fp8Names(exempt=model.fp8_exempt) if dummy else Fp8Names.of_files(directories)
    return DenseChoice(name, "chosen in the configuration", kept, few_rows_kernel=few_rows)


def _fits_few_rows(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell if kernels would do here as they were measured to."""
    on_gpu = device.type == "cuda" and dtype == torch.bfloat16
    return on_gpu and torch.cuda.get_device_capability(device)[0] == 9


def _check_triton_dense(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    def check(ok: bool, why: str) -> None:
        require(ok, "dense_backend", "triton", f"auto or torch{why}")

    check(device.type == "cuda", f" on device {device}")
    check(dtype.itemsize == 2, f" with dtype {dtype}")
    major = torch.cuda.get_device_capability(device)[0]
    check(major == 9, f": its tiles are for compute capability 9 (this device has {major})")
    check(model.fp8_exempt is not None, f": {NO_E4M3}")


NO_E4M3 = "no matrix is e4m3"
SLOW_PROMPTS = (
    "e4m3 is widened: triton keeps it, in half the memory; on an H200 it took 0.76 to 0.92 of "
    "bf16's time with up to 64 rows of Qwen3.5-122B's and 397B's layers, but 1.1 to 1.5 times from "
    "128 rows on"
)

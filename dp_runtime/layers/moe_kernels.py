"""Kernels that run a rank's experts over gathered rows: plain torch anywhere, Triton on a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dp_runtime.errors import require
from dp_runtime.kernels.expert_tiles import choose_tiles
from dp_runtime.layers.experts import Experts
from dp_runtime.layers.moe_router import Router
from dp_runtime.parallel.padding import PaddingPlan


class MoeKernels(Protocol):
    """Routes gathered rows, and runs this rank's experts over the real ones."""

    reads_fp8: ClassVar[bool]  # experts may be e4m3 with scales; else they are widened at load
    capturable: ClassVar[bool]  # nothing is read back to the host, so a CUDA graph may hold a call
    compiled: ClassVar[bool]  # its kernels are compiled, at start

    def partial_sums(
        self,
        gathered: Tensor,
        plan: PaddingPlan,
        row_ranges: Tensor | None,  # as `RowExchange` has them
        router: Router,
        experts: Experts,
    ) -> Tensor:
        """Sum this rank's experts' share of every row of [rows, hidden]; 0 for padded rows."""

    def activation_bytes(
        self, gathered_rows: int, padded: bool, router: Router, experts: Experts
    ) -> int: ...


class TorchMoe:
    """Copies the real rows out, runs them through grouped products, and copies the sums back."""

    reads_fp8: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    compiled: ClassVar[bool] = False

    def partial_sums(
        self,
        gathered: Tensor,
        plan: PaddingPlan,
        row_ranges: Tensor | None,
        router: Router,
        experts: Experts,
    ) -> Tensor:
        assert row_ranges is None, "these kernels read the real rows from the plan"
        if plan.real_index is None:
            return self._run(gathered, plan, router, experts)
        real = plan.real_index.to(gathered.device)
        sums = self._run(gathered[real], plan, router, experts)
        return torch.zeros_like(gathered).index_copy_(0, real, sums)

    def _run(self, rows: Tensor, plan: PaddingPlan, router: Router, experts: Experts) -> Tensor:
        if router.routing is None:
            return experts(rows, *reversed(router(rows)))
        weights, ids = router(rows, router.routing.replay)
        router.routing.write(ids, plan)
        return experts(rows, ids, weights)

    def activation_bytes(
        self, gathered_rows: int, padded: bool, router: Router, experts: Experts
    ) -> int:
        row = experts.down.shape[1] * experts.down.dtype.itemsize
        copied = gathered_rows * row if padded else 0
        routed = gathered_rows * router.top_k * (4 + 8)
        run = max(
            router.activation_bytes(gathered_rows),
            routed + experts.activation_bytes(gathered_rows, router.top_k),
        )
        return max(copied + run, gathered_rows * row + copied)


class TritonMoe:
    """Skips padded rows where they lie."""

    reads_fp8: ClassVar[bool] = True
    capturable: ClassVar[bool] = True
    compiled: ClassVar[bool] = True

    def partial_sums(
        self,
        gathered: Tensor,
        plan: PaddingPlan,
        row_ranges: Tensor | None,
        router: Router,
        experts: Experts,
    ) -> Tensor:
        from dp_runtime.kernels.experts import run_experts
        from dp_runtime.kernels.moe_router import route

        rows, (num_local, _, intermediate) = gathered.shape[0], experts.down.shape
        num_experts = router.gate.weight.shape[0]
        assert router.gate.bias is None, "the router's product adds no bias"
        routing = route(
            gathered,
            router.gate.weight,
            plan.row_ranges_on(gathered.device) if row_ranges is None else row_ranges,
            router.top_k,
            router.renormalize,
            experts.first_expert,
            num_local,
            router.routing,
        )
        fp8 = experts.scales is not None
        tiles = choose_tiles(rows, router.top_k, num_experts, intermediate, fp8)
        return run_experts(gathered, experts.gate_up, experts.down, routing, tiles, experts.scales)

    def activation_bytes(
        self, gathered_rows: int, padded: bool, router: Router, experts: Experts
    ) -> int:
        num_local, hidden, intermediate = experts.down.shape
        size, pairs = router.dtype.itemsize, gathered_rows * router.top_k
        routing = pairs * (4 + 4) + gathered_rows * num_local * 4
        peaks = 0 if experts.scales is None else pairs * -(-intermediate // 64) * 4
        activated = pairs * intermediate * size + peaks
        products = pairs * hidden * size + max(activated, gathered_rows * hidden * size)
        return routing + max(self._logits_bytes(gathered_rows, router), products)

    def _logits_bytes(self, rows: int, router: Router) -> int:
        from dp_runtime.kernels.moe_router import choose_router_tile, parts_shape

        num_experts, hidden = router.gate.weight.shape
        tile = choose_router_tile(rows, hidden, num_experts)
        size = router.dtype.itemsize if tile is None else 4
        return math.prod(parts_shape(rows, hidden, num_experts, tile)) * size


def choose_moe_backend(
    name: str, dtype: torch.dtype, device: torch.device, fp8: bool = False
) -> tuple[str, str]:
    """Resolve "auto" to a name, and say why; ValueError if it does not serve device or dtype."""
    if device.type == "cpu":
        ok = name in ("auto", "torch")
        require(ok, "moe_backend", name, "auto or torch on device cpu")
        return "torch", "the only kernels for device cpu"
    require(
        find_spec("triton") is not None, "device", str(device),
        "cpu: the layers' kernels for GPUs need the package triton, which is not installed",
    )  # fmt: skip
    if dtype.itemsize > 2:  # its tiles are made for 2-byte values
        ok = name in ("auto", "torch")
        require(ok, "moe_backend", name, f"auto or torch with dtype {dtype}")
        return "torch", f"the only kernels for {dtype}"
    if not _has_room(device):
        require(name != "triton", "moe_backend", name, f"auto or torch; {ROOM}")
        return "torch", ROOM
    if fp8 and torch.cuda.get_device_capability(device) < (8, 9):
        require(name != "triton", "moe_backend", name, f"auto or torch; {NO_FP8}")
        return "torch", NO_FP8
    if name != "auto":
        return name, "chosen in the configuration"
    return "triton", "the fastest measured on this kind of device"


ROOM = "its tiles need the shared memory of compute capability 8.0, 9 or 10"
NO_FP8 = "it reads e4m3 experts from compute capability 8.9 on"


def _has_room(device: torch.device) -> bool:
    capability = torch.cuda.get_device_capability(device)
    return capability == (8, 0) or capability[0] in (9, 10)


MOE_KERNELS: Mapping[str, type[MoeKernels]] = {"torch": TorchMoe, "triton": TritonMoe}


def make_moe_kernels(name: str) -> MoeKernels:
    return MOE_KERNELS[name]()

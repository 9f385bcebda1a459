"""Kernels of a profile by what they are for, beside the least time that each group needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from dp_runtime.models.config import ModelConfig
from examples.benchmarks.harness.floors import BYTES, uniform_active
from examples.benchmarks.harness.kernel_profile import Profile

ATTENTION, EXPERTS, DENSE, WIRE = "attention", "experts", "dense products", "collectives"
STATES, OTHER = "recurrent states", "other kernels of torch"
GROUPS = {  # by parts of kernels' names, the first that fits
    WIRE: ("gather_kernel", "reduce_scatter_kernel", "ncclDevKernel"),
    ATTENTION: (
        "split_kernel",
        "combine_kernel",
        "kernel_mha",
        "xqa",
        "fmha",
        "flash",
        "Prefill",
        "Decode",
    ),
    EXPERTS: ("gate_up_kernel", "down_kernel"),
    STATES: ("_convolve_kernel", "_step_kernel", "_solve_kernel", "_state_kernel"),
    "sums of pairs": ("sum_kernel",),
    "routing": ("_route_kernel", "_product_kernel"),
    "rotation and append": ("append_kernel",),
    "norms": ("rms_norm",),
    "gates": ("_multiply_gate_kernel", "_add_gated_kernel"),
    "maxima and draws": ("_part_maxima", "_row_maxima", "_part_races"),
    DENSE: ("nvjet", "gemm", "cublas", "cutlass", "splitK", "product_kernel", "widen_kernel"),
    "copies": ("Memcpy", "Memset", "direct_copy", "CatArray"),
}


def group_of(kernel: str) -> str:
    for group, parts in GROUPS.items():
        if any(part in kernel for part in parts):
            return group
    return OTHER


def group_us(profile: Profile) -> dict[str, float]:
    """Microseconds a step of every group that has any."""
    found: dict[str, float] = {}
    for name, _, us in profile.kernels:
        found[group_of(name)] = found.get(group_of(name), 0.0) + us
    return found


def busy_us(profile: Profile) -> float:
    """Of a step, without the collectives: they hold the wait for slower ranks."""
    return sum(us for group, us in group_us(profile).items() if group != WIRE)


def collective_us(profile: Profile) -> float:
    """Of a step, in the collectives, waits for slower ranks among them."""
    return group_us(profile).get(WIRE, 0.0)


def busy_us_of_steps(profile: Profile, with_collectives: bool) -> tuple[float, ...]:
    """The same of each profiled step: steps of later chunks of a prompt take longer."""
    return tuple(
        sum(us for name, us in step.items() if with_collectives or group_of(name) != WIRE)
        for step in profile.by_step
    )


def num_launches(profile: Profile) -> float:
    """Kernels of a step that are none of the large ones."""
    large = (ATTENTION, EXPERTS, DENSE, WIRE)
    return sum(calls for name, calls, _ in profile.kernels if group_of(name) not in large)


@dataclass(frozen=True)
class Rates:
    """What the machine does a second, measured: bytes, operations, bytes from peers."""

    read: float
    matmul: float
    wire: float


@cache
def measured_rates() -> Rates:
    """Those of this machine's GPUs; nothing has to cross where there is one."""
    from examples.benchmarks.harness.device_timing import matmul_rate, read_rate
    from examples.benchmarks.kernels.collectives_gpu import peer_rate

    wire = peer_rate() if torch.cuda.device_count() > 1 else math.inf
    return Rates(read_rate(), matmul_rate(), wire)


@dataclass(frozen=True)
class RankRows:
    """One rank's rows in a pass of the target, and those of all ranks."""

    prefill: int
    prefill_context: float  # mean keys that such a row sees
    decodes: int
    query_len: int
    decode_context: float
    total: int  # rows of all ranks
    dp_size: int

    @property
    def own(self) -> int:
        return self.prefill + self.decodes * self.query_len


def floors_us(model: ModelConfig, rows: RankRows, rates: Rates) -> dict[str, float]:
    """The target's pass alone: what must be read or computed, whichever takes longer."""
    hidden, layers, dim = model.hidden_size, model.num_layers, model.head_dim
    dense = (2 * model.num_heads + 2 * model.num_kv_heads) * dim * hidden
    sampled = rows.decodes * rows.query_len
    head = model.vocab_size * hidden if sampled else 0
    expert = 3 * model.moe_intermediate_size * hidden
    active = uniform_active(model, rows.total) / rows.dp_size
    pairs = rows.total * model.num_experts_per_tok / rows.dp_size
    moe, formats = model.num_moe_layers, zip(model.moe_layers, model.fp8_experts, strict=True)
    expert_bytes = sum((1 if fp8 else BYTES) * expert * active for is_moe, fp8 in formats if is_moe)
    kv_bytes = layers * rows.decodes * rows.decode_context * 2 * model.num_kv_heads * dim * BYTES
    scores = 4.0 * layers * rows.prefill * rows.prefill_context * model.num_heads * dim
    arriving = rows.total - rows.own + (rows.dp_size - 1) * rows.own  # gathered, then summed
    wire = moe * arriving * hidden * BYTES
    seconds = {
        ATTENTION: kv_bytes / rates.read + scores / rates.matmul,
        EXPERTS: max(expert_bytes / rates.read, 2 * moe * pairs * expert / rates.matmul),
        DENSE: max(
            layers * dense * BYTES / rates.read, 2 * rows.own * layers * dense / rates.matmul
        )
        + max(head * BYTES / rates.read, 2 * sampled * head / rates.matmul),
        WIRE: wire / rates.wire,
    }
    return {group: value * 1e6 for group, value in seconds.items()}


def group_table(
    profiles: Sequence[Profile], names: Sequence[str], floors: Sequence[Mapping[str, float]]
) -> str:
    """A line for each group: microseconds a step of every rank, each beside its floor."""
    found = [group_us(profile) for profile in profiles]
    lines = [f"{'us a step':<24}" + "".join(f"{name:>12}{'floor':>9}" for name in names)]
    for group in (*GROUPS, OTHER):
        if any(group in of_rank for of_rank in found):
            cells = (
                f"{of_rank.get(group, 0.0):>12.0f}"
                + (f"{floor[group]:>9.0f}" if group in floor else " " * 9)
                for of_rank, floor in zip(found, floors)
            )
            lines.append(f"{group:<24}" + "".join(cells))
    for name, values in (
        ("nothing", [profile.idle_us for profile in profiles]),
        ("in all", [profile.span_us for profile in profiles]),
    ):
        lines.append(f"{name:<24}" + "".join(f"{value:>12.0f}{'':9}" for value in values))
    return "\n".join(lines)

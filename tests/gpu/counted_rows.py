"""What ranks do in the GPU tests of rows that are counted on the device, inside CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.layers.experts import Experts
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import TritonMoe
from dp_runtime.layers.moe_router import Router
from dp_runtime.parallel.collective import Counts, DeviceCountCollective, RowCollective
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.parallel.row_exchange import (
    CountedExchange,
    PaddedExchange,
    graph_exchange,
)
from dp_runtime.parallel.step_board import StepBoard

BUCKET, OWN_ROWS, HIDDEN, TOP_K = 64, 48, 2048, 8
EXPERTS, INTERMEDIATE = 16, 128


def real_rows(size: int) -> Iterator[Counts]:
    """Even, uneven and no rows; no row at all; a few at random, the same on every rank."""
    yield (OWN_ROWS,) * size
    yield (1, *(OWN_ROWS,) * (size - 1))
    yield (*(17,) * (size - 1), 0)
    yield (0,) * size
    yield (0, *(5,) * (size - 1))
    generator = torch.Generator().manual_seed(size)
    for _ in range(4):
        yield tuple(torch.randint(0, OWN_ROWS + 1, (size,), generator=generator).tolist())


@dataclass(frozen=True, eq=False)
class Inputs:
    """One rank's rows and partial sums on its GPU, written in place before every replay."""

    rows: Tensor  # [OWN_ROWS, HIDDEN]
    partial: Tensor  # [dp_size * BUCKET, HIDDEN]
    layout: Tensor  # [2, dp_size] int32

    @classmethod
    def empty(cls, c: RowCollective) -> Inputs:
        device = torch.device("cuda", c.dp_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        total = c.dp_size * BUCKET
        starts = torch.arange(0, total, BUCKET, dtype=torch.int32, device=device)
        return cls(
            torch.zeros(OWN_ROWS, HIDDEN, dtype=torch.bfloat16, device=device),
            torch.zeros(total, HIDDEN, dtype=torch.bfloat16, device=device),
            torch.stack([starts, torch.zeros_like(starts)]),
        )

    def draw(self, dp_rank: int, step: int, real: Counts) -> PaddingPlan:
        """Fill them; partial sums of rows that are not real are NaN."""
        plan = PaddingPlan(real, (BUCKET,) * len(real))
        generator = torch.Generator().manual_seed(100 * step + dp_rank)
        self.rows.copy_(torch.randn(self.rows.shape, generator=generator))
        partial = torch.randn(self.partial.shape, generator=generator)
        for slot, count in zip(partial.split(plan.gathered_rows), real):
            slot[count:] = torch.nan
        self.partial.copy_(partial)
        self.layout.copy_(torch.from_numpy(plan.row_ranges))
        return plan


def captured(forward: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the call, which runs once before, and its result."""
    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = forward()
    return graph, out


def padded_sums(c: RowCollective, inputs: Inputs, plan: PaddingPlan) -> Tensor:
    """The own rows' sums, padding among them."""
    own = plan.real_rows[c.dp_rank]
    return c.reduce_scatter(inputs.partial, plan.gathered_rows)[:own]


@torch.inference_mode()
def padded_case(c: RowCollective, board: StepBoard) -> list[Tensor]:
    """The sums of every drawing."""
    inputs, results = Inputs.empty(c), []
    for step, real in enumerate(real_rows(c.dp_size)):
        plan = inputs.draw(c.dp_rank, step, real)
        results.append(padded_sums(c, inputs, plan).cpu())
    return results


@torch.inference_mode()
def replay_case(c: RowCollective, board: StepBoard, poison: bool) -> list[Tensor]:
    """Counts change between the replays of one graph; rows have the bits of eager calls."""
    assert isinstance(c, DeviceCountCollective)
    inputs, results = Inputs.empty(c), []
    gathered = torch.zeros(c.dp_size * BUCKET, HIDDEN, dtype=torch.bfloat16, device="cuda")
    sums = torch.zeros_like(gathered[:OWN_ROWS])

    def forward() -> Tensor:
        total = len(gathered)
        gathered.copy_(c.all_gather_v(inputs.rows, inputs.layout, total, BUCKET, poison))
        c.reduce_scatter_v(inputs.partial, inputs.layout, sums, BUCKET)
        return sums

    graph, out = captured(forward)
    for step, real in enumerate(real_rows(c.dp_size)):
        own = real[c.dp_rank]
        plan = inputs.draw(c.dp_rank, step, real)
        graph.replay()
        c.arm_watchdog("a replay")
        found, slots = out.clone(), gathered.split(plan.gathered_rows)
        due = c.all_gather(inputs.rows[:own], real).split(real)
        for slot, rows in zip(slots, due):
            assert torch.equal(slot[: len(rows)], rows)
            assert not poison or slot[len(rows) :].isnan().all()
        assert torch.equal(found[:own], padded_sums(c, inputs, plan))
        assert (found[own:] == 0).all(), "null rows are 0"
        results.append(found[:own].cpu())
        if step == 1:  # buffers grow, and the graph keeps its own
            many = (500,) * c.dp_size
            large = c.all_gather(torch.ones(500, HIDDEN, device="cuda"), many)
            assert (c.reduce_scatter(large, many) == c.dp_size).all()
    c.raise_if_failed()
    return results


@torch.inference_mode()
def stage_case(c: RowCollective, board: StepBoard, poison: bool) -> None:
    """A whole MoE stage in one graph has the bits of the same stage outside."""
    rank, size = c.dp_rank, c.dp_size
    inputs, stage = Inputs.empty(c), random_stage(rank, size)
    exchange = graph_exchange(c, OWN_ROWS, BUCKET, poison, inputs.layout)
    assert isinstance(exchange, CountedExchange) == isinstance(c, DeviceCountCollective)
    graph, out = captured(lambda: stage(inputs.rows, exchange))
    for step, real in enumerate(real_rows(size)):
        plan = inputs.draw(rank, step, real)
        graph.replay()
        c.arm_watchdog("a replay")
        fast = out.clone()
        slow = stage(inputs.rows[: real[rank]], PaddedExchange(plan, c, poison))
        assert slow.isfinite().all()
        assert torch.equal(fast[: real[rank]], slow)
        assert (fast[real[rank] :] == 0).all(), "null rows are 0"
    c.raise_if_failed()


def random_stage(dp_rank: int, dp_size: int) -> MoeStage:
    """The same router on every rank, and this rank's experts."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).bfloat16().cuda()

    router = Router(Linear(draw(EXPERTS, HIDDEN), None), TOP_K, True)
    gate_up, down = draw(EXPERTS, 2 * INTERMEDIATE, HIDDEN), draw(EXPERTS, HIDDEN, INTERMEDIATE)
    own = RankSharding("ep", dp_rank, dp_size).shard(EXPERTS, INTERMEDIATE).experts
    mine = slice(own.start, own.stop)
    experts = Experts(gate_up[mine].contiguous(), down[mine].contiguous(), own.start)
    return MoeStage(router, experts, TritonMoe())

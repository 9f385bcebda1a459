"""The MoE stage's Triton kernels at the Qwen3-30B-A3B shape in bf16, eager and in a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.core.e4m3 import E4M3
from dp_runtime.kernels.expert_tiles import FLAT, ExpertTiles, Tile, choose_tiles
from dp_runtime.kernels.experts import run_experts
from dp_runtime.kernels.moe_router import Routing, route
from dp_runtime.layers.experts import fused_experts
from dp_runtime.weights.fp8_blocks import ExpertScales, dequantize

HIDDEN, EXPERTS, TOP_K = 2048, 128, 8
SHARDS = {"ep4": (32, 768), "tp4": (128, 192)}


class Stage:
    """One shard's layer with random weights."""

    def __init__(self, shard: str) -> None:
        torch.manual_seed(0)
        self.num_local, self.intermediate = SHARDS[shard]
        device = torch.device("cuda")
        self.router = torch.randn(EXPERTS, HIDDEN, device=device).bfloat16() * 0.05
        shape = self.num_local, 2 * self.intermediate, HIDDEN
        self.gate_up = torch.randn(shape, device=device).bfloat16() * 0.02
        shape = self.num_local, HIDDEN, self.intermediate
        self.down = torch.randn(shape, device=device).bfloat16() * 0.02

    def route(self, rows: Tensor, row_ranges: Tensor) -> Routing:
        return route(rows, self.router, row_ranges, TOP_K, True, 0, self.num_local)

    def run(
        self, rows: Tensor, row_ranges: Tensor, tiles: ExpertTiles | None = None
    ) -> tuple[Routing, Tensor]:
        routing = self.route(rows, row_ranges)
        if tiles is None:
            tiles = choose_tiles(len(rows), TOP_K, EXPERTS, self.intermediate, fp8=False)
        return routing, run_experts(rows, self.gate_up, self.down, routing, tiles)

    def due(self, rows: Tensor, routing: Routing) -> Tensor:
        ids = torch.where(routing.local_ids < 0, EXPERTS, routing.local_ids).long()
        return fused_experts(rows, self.gate_up, self.down, ids, routing.weights, 0)


def layout_of(first: int, second: int, gathered: int) -> Tensor:
    """Two ranks with so many gathered rows each, and so many real ones."""
    return torch.tensor([[0, gathered], [first, second]], dtype=torch.int32, device="cuda")


def poisoned(gathered: int, first: int, second: int) -> tuple[Tensor, Tensor]:
    """Random rows of two ranks, NaN in the padding, and which are real."""
    rows = torch.randn(2 * gathered, HIDDEN, device="cuda").bfloat16()
    row = torch.arange(2 * gathered, device="cuda")
    real = (row < first) | ((row >= gathered) & (row < gathered + second))
    rows[~real] = float("nan")
    return rows, real


@pytest.mark.parametrize("shard", list(SHARDS))
@pytest.mark.parametrize("gathered", [1, 8, 32, 64, 128, 256, 512, 700, 2048, 8192])
def test_all_sizes_equal_grouped_products(shard: str, gathered: int) -> None:
    check(Stage(shard), gathered)


@pytest.mark.parametrize("gathered", [1, 64, 700, 2048])
@pytest.mark.parametrize("rest", [32, 64])
def test_rests_and_joint_blocks_equal_grouped_products(gathered: int, rest: int) -> None:
    tile = Tile(128, 64, 64, 4, 3, True, FLAT, rest=rest)
    check(Stage("ep4"), gathered, ExpertTiles(replace(tile, joint=True), tile))


def check(stage: Stage, gathered: int, tiles: ExpertTiles | None = None) -> None:
    first, second = gathered, gathered * 2 // 3
    rows, real = poisoned(gathered, first, second)
    for _ in range(3):  # what one call leaves behind would show in the next
        routing, out = stage.run(rows, layout_of(first, second, gathered), tiles)
    assert torch.equal(out[~real], torch.zeros_like(out[~real]))
    due = stage.due(rows[real], Routing(
        routing.weights[real], routing.local_ids[real], routing.counts, routing.pairs
    ))  # fmt: skip
    error = (out[real].float() - due.float()).norm()
    assert error <= 1e-2 * due.float().norm()  # both are 0 where no row has a local expert


def e4m3_like(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 matrices of the same shape, their scales, and what they stand for in bf16."""
    num_local, outputs, inputs = weights.shape
    scales = torch.rand(num_local, outputs // 128, inputs // 128, device="cuda") * 1e-3 + 1e-4
    values = torch.randn(weights.shape, device="cuda").mul_(20).to(E4M3)
    wide = [dequantize(*pair).bfloat16() for pair in zip(values, scales)]
    return values, scales, torch.stack(wide)


@pytest.mark.parametrize("gathered", [1, 8, 32, 64, 128, 256, 512, 700, 2048])
@pytest.mark.parametrize(
    ("swap", "regroup", "f16"),
    [(False, False, False), (True, False, True), (True, True, False), (True, True, True)],
)
def test_e4m3_experts_equal_widened_ones(
    gathered: int, swap: bool, regroup: bool, f16: bool
) -> None:
    """Scales of neighbouring blocks differ by up to ten."""
    stage = Stage("ep4")
    gate_up, gate_up_scales, wide_gate_up = e4m3_like(stage.gate_up)
    down, down_scales, wide_down = e4m3_like(stage.down)
    scales = ExpertScales(gate_up_scales, down_scales)
    rows, real = poisoned(gathered, gathered, gathered // 2)
    routing = stage.route(rows, layout_of(gathered, gathered // 2, gathered))
    tiles = choose_tiles(len(rows), TOP_K, EXPERTS, stage.intermediate, fp8=True)
    if swap:
        swapped = Tile(16, 64, 128, 4, 3, True, swap=True, regroup=regroup, f16=f16)
        tiles = ExpertTiles(swapped, replace(swapped, block_m=32, block_n=128))
    for _ in range(3):
        out = run_experts(rows, gate_up, down, routing, tiles, scales)
    assert torch.equal(out[~real], torch.zeros_like(out[~real]))
    ids = torch.where(routing.local_ids < 0, EXPERTS, routing.local_ids).long()[real]
    due = fused_experts(rows[real], wide_gate_up, wide_down, ids, routing.weights[real], 0).float()
    error = (out[real].float() - due).norm()
    assert error <= 1e-2 * due.norm()


@pytest.mark.parametrize("num_experts", [128, 256, 512])
@pytest.mark.parametrize("gathered", [4, 16, 30, 128, 250, 512, 3000])
def test_the_best_experts_are_chosen(gathered: int, num_experts: int) -> None:
    torch.manual_seed(0)
    rows, real = poisoned(gathered, gathered, gathered)
    assert real.all()
    router = torch.randn(num_experts, HIDDEN, device="cuda").bfloat16() * 0.05
    row_ranges = layout_of(gathered, gathered, gathered)
    routing = route(rows, router, row_ranges, TOP_K, True, 0, num_experts)
    logits = rows.float() @ router.float().T
    ids = routing.local_ids.long()
    chosen = logits.gather(1, ids)
    left = logits.scatter(1, ids, float("-inf")).max(1).values
    assert (chosen.min(1).values >= left - left.abs() * 2**-6).all(), "but for bf16's rounding"
    torch.testing.assert_close(routing.weights, chosen.softmax(-1), atol=2e-2, rtol=5e-2)
    assert int(routing.counts.sum()) == ids.numel()
    for expert, count in enumerate(routing.counts.tolist()):
        pairs = routing.pairs[expert, :count].sort().values
        assert torch.equal(pairs, (ids.flatten() == expert).nonzero().flatten().int())


@pytest.mark.parametrize("shard", list(SHARDS))
@pytest.mark.parametrize("gathered", [16, 128, 2048])
def test_a_graph_follows_rows_and_counts(shard: str, gathered: int) -> None:
    """Several layers in a row, as in a model: a kernel may start while the one before it ends."""
    stage = Stage(shard)
    rows, _ = poisoned(gathered, gathered, gathered)
    row_ranges = layout_of(gathered, gathered, gathered)

    def layers() -> Tensor:
        x = rows
        for _ in range(6):
            x = x + stage.run(x, row_ranges)[1]
        return x

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers()
    for first, second in ((gathered, 1), (0, 0), (gathered // 2, gathered), (0, gathered)):
        new, real = poisoned(gathered, first, second)
        rows.copy_(new)
        row_ranges.copy_(layout_of(first, second, gathered))
        for _ in range(3):
            graph.replay()
        assert torch.equal(found[real], layers()[real])

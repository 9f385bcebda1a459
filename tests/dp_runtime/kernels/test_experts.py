"""The MoE stage's Triton kernels in the interpreter, on CPU tensors, against plain torch layers.

The interpreter has no bfloat16 products; float32 and float16 show the same code paths.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.core.request import RoutingShape
from dp_runtime.kernels import moe_router as triton_router
from dp_runtime.kernels.expert_tiles import ExpertTiles, Tile, choose_tiles
from dp_runtime.kernels.experts import gate_up_pairs, run_experts, sum_pairs
from dp_runtime.kernels.moe_router import RouterTile, Routing, logits_in_parts, route
from dp_runtime.layers.experts import fused_experts
from dp_runtime.layers.routing_buffer import RoutingBuffer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def row_ranges(starts: list[int], real: list[int]) -> Tensor:
    return torch.tensor([starts, real], dtype=torch.int32, device=DEVICE)


def routed(
    logits: Tensor, at: Tensor, top_k: int, renormalize: bool, first: int, num_local: int
) -> Routing:
    """Rows that are their own logits: the router is the identity."""
    router = torch.eye(logits.shape[1], dtype=logits.dtype, device=DEVICE)
    return route(logits, router, at, top_k, renormalize, first, num_local)


LAYOUTS = [
    ([0], [9], 9, True),
    ([0, 6], [4, 6], 12, False),
    ([0, 3, 6, 9], [3, 0, 1, 2], 12, True),
    ([0, 1, 1], [1, 0, 5], 6, False),
    ([0, 4], [0, 0], 8, True),
]


@pytest.mark.parametrize(("starts", "real", "rows", "renormalize"), LAYOUTS)
def test_routing_takes_real_rows_and_local_experts_only(
    starts: list[int], real: list[int], rows: int, renormalize: bool
) -> None:
    torch.manual_seed(0)
    logits = draw(rows, 12)
    mine = [r for s, n in zip(starts, real) for r in range(s, s + n)]
    padded = sorted(set(range(rows)) - set(mine))
    logits[padded] = float("nan")
    routing = routed(logits, row_ranges(starts, real), 3, renormalize, 4, 5)
    weights, ids = logits[mine].softmax(-1).topk(3, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    ours = (ids >= 4) & (ids < 9)
    assert torch.equal(routing.local_ids[mine], torch.where(ours, ids - 4, -1).int())
    torch.testing.assert_close(routing.weights[mine], torch.where(ours, weights, 0.0))
    assert (routing.local_ids[padded] == -1).all()
    assert (routing.weights[padded] == 0).all()
    check_pairs(routing)


@pytest.mark.parametrize(("starts", "real", "rows", "renormalize"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_choices_for_one_ranks_real_rows_are_kept(
    starts: list[int], real: list[int], rows: int, renormalize: bool, dtype: torch.dtype
) -> None:
    """Whoever has the experts, and nothing else of the buffer is written."""
    torch.manual_seed(1)
    logits, router = draw(rows, 12), torch.eye(12, device=DEVICE)
    at = row_ranges(starts, real)
    plain = route(logits, router, at, 3, renormalize, 4, 5)
    for position, (start, count) in enumerate(zip(starts, real)):
        shape = RoutingShape(4, 3, 12 if dtype is torch.uint8 else 300)
        buffer = RoutingBuffer(shape, rows, position, DEVICE)
        buffer.ids.fill_(77)
        routing = route(logits, router, at, 3, renormalize, 4, 5, buffer.layer(2))
        due = torch.full_like(buffer.ids, 77)
        chosen = logits[start : start + count].topk(3, -1).indices
        due[:count, 2] = chosen.to(dtype)
        assert torch.equal(buffer.ids, due)
        assert torch.equal(routing.local_ids, plain.local_ids)
        assert torch.equal(routing.weights, plain.weights)


def check_pairs(routing: Routing) -> None:
    """Counts and pairs say what the local ids say."""
    ids = routing.local_ids.flatten()
    for expert, count in enumerate(routing.counts.tolist()):
        pairs = routing.pairs[expert, :count].sort().values
        assert torch.equal(pairs, (ids == expert).nonzero().flatten().int())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("hidden", [72, 128, 264])
@pytest.mark.parametrize(("rows", "split"), [(1, True), (16, True), (37, True), (37, False)])
def test_the_product_is_the_routers(
    rows: int, split: bool, hidden: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_router, "MAX_SPLIT_ROWS", rows if split else rows - 1)
    torch.manual_seed(6)
    router, x = draw(20, hidden, dtype=dtype), draw(rows, hidden, dtype=dtype)
    routing = route(x, router, row_ranges([0], [rows]), 4, True, 5, 6)
    logits = (x.double() @ router.double().T).to(dtype)
    best = logits.float().sort(dim=-1, descending=True)
    near = (best.values[:, :5].diff(dim=-1).abs() < 0.05).any(-1)  # may be ordered either way
    assert near.sum() <= rows // 3, "most rows are compared"
    weights, ids = logits.float().softmax(-1).gather(1, best.indices)[:, :4], best.indices[:, :4]
    weights = weights / weights.sum(-1, keepdim=True)
    ours = (ids >= 5) & (ids < 11)
    due = torch.where(ours, ids - 5, -1).int()
    assert torch.equal(routing.local_ids[~near], due[~near])
    weight = torch.where(ours, weights, 0.0)[~near]
    torch.testing.assert_close(routing.weights[~near], weight, atol=5e-3, rtol=5e-3)
    check_pairs(routing)


@pytest.mark.parametrize("tile", [RouterTile(16, 128), RouterTile(64, 256), RouterTile(16, 512)])
def test_parts_of_the_product_sum_up(tile: RouterTile) -> None:
    """More experts than a program has, and columns that end within a part."""
    torch.manual_seed(7)
    router, x, counts = draw(200, 456), draw(70, 456), torch.ones(5, device=DEVICE).int()
    parts = logits_in_parts(x, router, counts, tile)
    assert len(parts) == -(-456 // tile.split)
    due = x.double() @ router.double().T
    torch.testing.assert_close(parts.double().sum(0), due, atol=1e-4, rtol=0.0)
    assert not counts.any()


def test_equal_probabilities_are_taken_in_the_order_of_experts() -> None:
    """Equal logits, logits so low that their probability is 0, and none that is a number."""
    logits = torch.arange(200.0, device=DEVICE).repeat(4, 1) / 100
    logits[0, [70, 150, 9]] = 5.0
    logits[1, 120] = 400.0
    logits[2, 3] = float("nan")
    routing = routed(logits, row_ranges([0], [4]), 4, False, 0, 200)
    due = [[9, 70, 150, 199], [120, 0, 1, 2], [0, 1, 2, 3], [199, 198, 197, 196]]
    assert routing.local_ids.tolist() == due
    check_pairs(routing)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "blocks", "per_multiprocessor"),
    [
        (64, 32, (16, 16, 16), 16),
        (48, 24, (16, 32, 32), 1),
        (32, 40, (32, 16, 16), None),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in (
                (32, 40, (32, 16, 16), 3),
                (64, 32, (16, 16, 16), None),
                (48, 24, (16, 32, 32), None),
            )
        ),
    ],
)
def test_experts_equal_the_torch_loop(
    hidden: int,
    intermediate: int,
    blocks: tuple[int, int, int],
    per_multiprocessor: int | None,
    tma: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(1)
    rows, experts, first, local = draw(20, hidden, dtype=dtype), 8, 2, 5
    gate_up = draw(local, 2 * intermediate, hidden, dtype=dtype, scale=0.2)
    down = draw(local, hidden, intermediate, dtype=dtype, scale=0.2)
    logits = draw(20, experts, dtype=dtype)
    logits[:, first + 1] = -30.0  # a local expert without rows
    real = [*range(7), *range(10, 20)]
    rows[7:10] = float("nan")
    routing = routed(logits, row_ranges([0, 10], [7, 10]), 2, True, first, local)
    tile = Tile(*blocks, 4, 2, tma, per_multiprocessor)
    rest = 0 if tile.by_expert else blocks[0] // 2
    swapped = replace(tile, swap=True, rest=rest)
    out = run_experts(rows, gate_up, down, routing, ExpertTiles(tile, swapped))
    weights, ids = logits[real].softmax(-1, dtype=torch.float32).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    due = fused_experts(rows[real].float(), gate_up.float(), down.float(), ids, weights, first)
    error = (out[real].float() - due).norm() / due.norm()
    assert error < TOLERANCE[dtype]
    assert (out[7:10] == 0).all(), "padded rows are zero"


@pytest.mark.parametrize(
    ("intermediate", "block_n", "per_multiprocessor", "swap"),
    [
        (40, 32, 1, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((40, 32, None, True), (32, 16, None, False), (32, 16, 1, True))
        ),
    ],
)
def test_gate_and_up_are_read_as_one_block(
    intermediate: int, block_n: int, per_multiprocessor: int | None, swap: bool
) -> None:
    """Blocks of columns that end where gate does and beyond, rests of an expert, and none."""
    torch.manual_seed(3)
    rows, gate_up = draw(40, 48), draw(2, 2 * intermediate, 48)
    routing = routed(draw(40, 6), row_ranges([0], [40]), 2, True, 1, 2)
    plain = Tile(32, block_n, 16, 4, 2, True, per_multiprocessor, swap)
    rest = 0 if plain.by_expert else 16
    joint = replace(plain, joint=True, rest=rest)
    due, found = (gate_up_pairs(rows, gate_up, routing, tile).values for tile in (plain, joint))
    counts = routing.counts.tolist()
    lists = [routing.pairs[expert, :count] for expert, count in enumerate(counts)]
    written = torch.cat(lists).long() if plain.by_expert else torch.arange(sum(counts))
    assert len(written) > 16
    torch.testing.assert_close(found[written], due[written], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("intermediate", "pairs"),
    [
        (72, 64),
        *(pytest.param(72, pairs, marks=pytest.mark.slow) for pairs in (1, 8, 16, 40, 512)),
        *(pytest.param(520, pairs, marks=pytest.mark.slow) for pairs in (1, 8, 16, 40, 64, 100)),
    ],
)
def test_tiles_in_use_equal_the_torch_loop(intermediate: int, pairs: int) -> None:
    """Of so many pairs an expert; columns of both products end within a block."""
    torch.manual_seed(4)
    rows, gate_up, down = draw(150, 136), draw(2, 2 * intermediate, 136), draw(2, 136, intermediate)
    routing = routed(draw(150, 5), row_ranges([0], [150]), 2, True, 1, 2)
    tiles = choose_tiles(pairs, 1, 1, intermediate, fp8=False)
    out = run_experts(rows, gate_up, down, routing, tiles)
    ids = torch.where(routing.local_ids < 0, 5, routing.local_ids + 1).long()
    due = fused_experts(rows, gate_up, down, ids, routing.weights, 1)
    assert (out - due).norm() < 2e-5 * due.norm()


def test_pairs_are_summed_in_the_order_of_their_experts() -> None:
    weighted = draw(3 * 2, 40, dtype=torch.float16)
    weighted[[1, 4, 5]] = float("nan")  # never written
    ids = torch.tensor([[0, -1], [1, 0], [-1, -1]], dtype=torch.int32, device=DEVICE)
    out = sum_pairs(weighted, ids)
    assert torch.equal(out[0], weighted[0])
    assert torch.equal(out[1], (weighted[2].float() + weighted[3].float()).half())
    assert torch.equal(out[2], torch.zeros_like(out[2]))


def test_a_rank_without_experts_gives_zeros() -> None:
    routing = routed(draw(4, 6), row_ranges([0], [4]), 2, True, 0, 0)
    tiles = choose_tiles(4, 2, 6, 16, fp8=False)
    out = run_experts(draw(4, 32), draw(0, 32, 32), draw(0, 32, 16), routing, tiles)
    assert out.shape == (4, 32)
    assert torch.equal(out, torch.zeros_like(out))

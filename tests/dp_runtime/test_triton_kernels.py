"""The Triton kernels in the interpreter, on CPU tensors, against the plain torch layers.

The interpreter has no bfloat16 products; float32 and float16 show the same code paths.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.attention.triton_append import append_rows
from dp_runtime.layers.expert_tiles import ExpertTiles, Tile, choose_tiles
from dp_runtime.layers.experts import fused_experts
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.rotary import rotate
from dp_runtime.layers.triton_experts import route, run_experts
from dp_runtime.layers.triton_norm import add_rms_norm, norm_and_rotate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def layout(starts: list[int], real: list[int]) -> Tensor:
    return torch.tensor([starts, real], dtype=torch.int32, device=DEVICE)


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
    routing = route(logits, layout(starts, real), 3, renormalize, first_expert=4, num_local=5)
    weights, ids = logits[mine].softmax(-1).topk(3, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    ours = (ids >= 4) & (ids < 9)
    assert torch.equal(routing.local_ids[mine], torch.where(ours, ids - 4, -1).int())
    torch.testing.assert_close(routing.weights[mine], torch.where(ours, weights, 0.0))
    assert (routing.local_ids[padded] == -1).all()
    assert (routing.weights[padded] == 0).all()
    for expert in range(5):
        count = int(routing.counts[expert])
        pairs = sorted(routing.pairs[expert, :count].tolist())
        due = [r * 3 + j for r in range(rows) for j in range(3)
               if int(routing.local_ids[r, j]) == expert]  # fmt: skip
        assert pairs == due


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("hidden", "intermediate", "tile"),
    [
        (64, 32, Tile(16, 16, 16, 1, 4, 2)),
        (48, 24, Tile(16, 32, 32, 2, 4, 2)),
        (32, 40, Tile(32, 16, 16, 3, 4, 2)),
    ],
)
def test_experts_equal_the_torch_loop(
    hidden: int, intermediate: int, tile: Tile, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    rows, experts, first, local = draw(20, hidden, dtype=dtype), 8, 2, 5
    gate_up = draw(local, 2 * intermediate, hidden, dtype=dtype, scale=0.2)
    down = draw(local, hidden, intermediate, dtype=dtype, scale=0.2)
    logits = draw(20, experts, dtype=dtype)
    real = [*range(7), *range(10, 20)]
    rows[7:10] = float("nan")
    routing = route(logits, layout([0, 10], [7, 10]), 2, True, first, local)
    out = run_experts(rows, gate_up, down, routing, ExpertTiles(tile, tile))
    weights, ids = logits[real].softmax(-1, dtype=torch.float32).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    due = fused_experts(rows[real].float(), gate_up.float(), down.float(), ids, weights, first)
    error = (out[real].float() - due).norm() / due.norm()
    assert error < TOLERANCE[dtype]
    assert (out[7:10] == 0).all(), "padded rows are zero"


def test_a_rank_without_experts_gives_zeros() -> None:
    routing = route(draw(4, 6), layout([0], [4]), 2, True, first_expert=0, num_local=0)
    tiles = choose_tiles(4, 2, 6, 16)
    out = run_experts(draw(4, 32), draw(0, 32, 32), draw(0, 32, 16), routing, tiles)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("size", [48, 64])
def test_norm_with_and_without_a_residual(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(2)
    x, residual, weight = (draw(*s, dtype=dtype) for s in ((5, size), (5, size), (size,)))
    norm, total = RMSNorm(weight, 1e-6), residual + x
    torch.testing.assert_close(add_rms_norm(x, None, weight, 1e-6), norm(x))
    torch.testing.assert_close(add_rms_norm(x, residual, weight, 1e-6), norm(total))
    assert torch.equal(residual, total), "the residual holds the sum"
    assert add_rms_norm(x[:0], residual[:0], weight, 1e-6).shape == (0, size)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (16, 1, 32), (4, 4, 16)])
def test_norm_and_rotation_of_queries_and_keys(
    heads: int, kv_heads: int, head_dim: int, normed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    qkv = draw(5, heads + 2 * kv_heads, head_dim, dtype=dtype)
    weight = draw(heads + kv_heads, head_dim, dtype=dtype)
    angles = torch.rand(5, 1, head_dim // 2, device=DEVICE) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q, k = norm_and_rotate(qkv, heads, kv_heads, weight if normed else None, 1e-6, cos, sin)
    due = qkv[:, : heads + kv_heads]
    due = rotate(RMSNorm(weight, 1e-6)(due) if normed else due, (cos, sin))
    for found, expected in zip((q, k), due.tensor_split([heads], 1)):
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize(("kv_heads", "head_dim", "page_size"), [(2, 24, 8), (3, 16, 16)])
def test_new_rows_go_to_their_slots(
    kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    pool = draw(5, 2, kv_heads, page_size, head_dim, scale=9).abs().to(dtype)
    qkv = draw(6, 4 + 2 * kv_heads, head_dim, scale=9).abs().to(dtype)
    k, v = qkv[:, 4 : 4 + kv_heads], qkv[:, 4 + kv_heads :]
    slots = torch.randperm(5 * page_size)[:6].to(DEVICE)
    due = pool.clone()
    due[slots // page_size, 0, :, slots % page_size] = k
    due[slots // page_size, 1, :, slots % page_size] = v
    append_rows(pool, slots, k, v)
    assert torch.equal(pool, due)

"""The Triton kernels in the interpreter, on CPU tensors, against the plain torch layers.

The interpreter has no bfloat16 products; float32 and float16 show the same code paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.core.e4m3 import quantize
from dp_runtime.core.qk_norm_rope import QkNormRope, rotate
from dp_runtime.kernels.argmax import BLOCK, BLOCKS_AT_ONCE, row_maxima
from dp_runtime.kernels.kv_append import append_rows, rotate_and_append
from dp_runtime.kernels.norm import add_rms_norm
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.sampling.row_logits import RowLogits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("size", [48, 64])
def test_norm_with_and_without_a_residual(dtype: torch.dtype, size: int, wide: bool) -> None:
    torch.manual_seed(2)
    x, residual, weight = (draw(*s, dtype=dtype) for s in ((5, size), (5, size), (size,)))
    weight = draw(size) if wide else weight
    norm, total = RMSNorm(weight, 1e-6), residual + x
    torch.testing.assert_close(add_rms_norm(x, None, weight, 1e-6), norm(x))
    torch.testing.assert_close(add_rms_norm(x, residual, weight, 1e-6), norm(total))
    assert torch.equal(residual, total), "the residual holds the sum"
    assert add_rms_norm(x[:0], residual[:0], weight, 1e-6).shape == (0, size)


@dataclass(frozen=True, eq=False)
class Heads:
    """Unrotated rows, and what the plain layers make of them."""

    qkv: Tensor
    rotation: QkNormRope
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def draw(
        cls, rows: int, heads: int, kv_heads: int, head_dim: int,
        gain: torch.dtype | None, dtype: torch.dtype,
    ) -> Heads:  # fmt: skip
        wide = draw(rows, heads + 2 * kv_heads + 3, head_dim, dtype=dtype)
        qkv, weight = wide[:, 3:], draw(heads + kv_heads, head_dim, dtype=gain or dtype)
        angles = torch.rand(rows, 1, head_dim // 2, device=DEVICE) * 6
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        qk, v = qkv.tensor_split([heads + kv_heads], 1)
        qk = RMSNorm(weight, 1e-6)(qk) if gain else qk
        q, k = rotate(qk, (cos, sin)).tensor_split([heads], 1)
        return cls(qkv, QkNormRope(weight if gain else None, 1e-6, cos, sin), q, k, v)


SHAPES = [(6, 2, 24), (16, 1, 64), (4, 4, 16), (11, 3, 128), (8, 2, 256)]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("norm", ["none", "own dtype", "float32"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_queries_come_back_rotated_and_keys_and_values_go_to_the_pool(
    heads: int, kv_heads: int, head_dim: int, norm: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    gain = {"none": None, "own dtype": dtype, "float32": torch.float32}[norm]
    rows = Heads.draw(6, heads, kv_heads, head_dim, gain, dtype)
    pool = draw(4, 2, kv_heads, 8, head_dim, dtype=dtype)
    # Two null rows of a graph, and one of a piece, which is written nowhere.
    slots = torch.tensor([31, 8, 9, 0, 0, -1], dtype=torch.int32, device=DEVICE)
    due = pool.clone()
    q = rotate_and_append(pool, slots, rows.qkv, rows.rotation, 1.0, 1.0)
    tolerance: dict[str, Any] = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    assert q.is_contiguous()
    torch.testing.assert_close(q, rows.q, **tolerance)
    for row, slot in enumerate(slots.tolist()[:3]):
        page, offset = divmod(slot, 8)
        torch.testing.assert_close(pool[page, 0, :, offset], rows.k[row], **tolerance)
        assert torch.equal(pool[page, 1, :, offset], rows.v[row])
        due[page, :, :, offset] = pool[page, :, :, offset]
    due[0, :, :, 0] = pool[0, :, :, 0]
    assert torch.equal(pool, due), "no other slot was written"


def test_queries_are_written_where_the_caller_says() -> None:
    rows = Heads.draw(3, 6, 2, 24, torch.float32, torch.float32)
    slots = torch.arange(3, dtype=torch.int32, device=DEVICE)
    pools = [draw(1, 2, 2, 8, 24, dtype=torch.float32) for _ in range(2)]
    arguments = slots, rows.qkv, rows.rotation, 1.0, 1.0
    due = rotate_and_append(pools[0], *arguments)
    buffer = torch.full((5, *due.shape[1:]), torch.nan, device=DEVICE)
    out = buffer[:3]
    assert rotate_and_append(pools[1], *arguments, out) is out
    assert torch.equal(out, due)
    assert buffer[3:].isnan().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_quantised_pool_gets_the_bits_of_quantize(dtype: torch.dtype) -> None:
    """Turned by nothing (cos 1, sin 0), keys round only where they are stored."""
    torch.manual_seed(5)
    rows, k_scale, v_scale = 12, 2.0**-8, 0.25  # exact, whether divided by or multiplied
    spread = (2.0 ** torch.arange(-11, 1)).view(rows, 1, 1).to(DEVICE, dtype)
    qkv = draw(rows, 5 + 2 * 2, 16, dtype=dtype) * spread
    edges = [float("nan"), float("inf"), -1e3, 0.0, -0.0, 2.0**-11, 3 * 2.0**-12, 448.0 / 4, 119.0]
    qkv[0, 7, : len(edges)] = torch.tensor(edges, device=DEVICE, dtype=dtype)
    cos, sin = (torch.full((rows, 1, 8), x, dtype=dtype, device=DEVICE) for x in (1.0, 0.0))
    pool = torch.zeros(2, 2, 2, 8, 16, dtype=torch.uint8, device=DEVICE)
    slots = torch.arange(rows, device=DEVICE)
    rotation = QkNormRope(None, 0.0, cos, sin)
    rotate_and_append(pool, slots, qkv, rotation, k_scale, v_scale)
    stored = pool.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :rows]
    assert torch.equal(stored[0], quantize(qkv[:, 5:7], k_scale).view(torch.uint8))
    assert torch.equal(stored[1], quantize(qkv[:, 7:], v_scale).view(torch.uint8))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 130, BLOCK * BLOCKS_AT_ONCE, 2 * BLOCK * BLOCKS_AT_ONCE + 7])
def test_the_first_of_equal_maxima_and_what_is_not_finite(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    inf, last = torch.inf, size - 1
    rows = (draw(12, size + 3, dtype=dtype, scale=8).round() / 4)[:, :size]  # ties; strided
    rows[1], rows[2], rows[3, last], rows[4, size // 2] = -inf, 0.0, inf, torch.nan
    rows[2, : size // 2] = -0.0
    rows[5], rows[6] = -3.0, -inf
    rows[5, last] = rows[6, last] = -2.0
    rows[7, last] = -torch.tensor(torch.nan)
    rows[8, 0] = inf
    rows[8, last] = torch.nan
    rows[9] = torch.finfo(dtype).min
    peaks, best, finite = row_maxima(rows)
    due, first = rows.cpu().max(-1)
    assert torch.equal(finite.cpu(), due.isfinite())
    assert torch.equal(peaks.cpu().nan_to_num(7), due.float().nan_to_num(7))
    numbers = ~due.isnan()
    assert torch.equal(best.cpu()[numbers], first[numbers])
    assert ((best >= 0) & (best < size)).all(), "also a NaN's token is looked up in the next step"


def test_no_rows_have_no_maxima() -> None:
    peaks, best, finite = row_maxima(draw(0, 50))
    assert (peaks.shape, best.dtype, finite.dtype) == ((0,), torch.int64, torch.bool)
    some = RowLogits.from_logits(draw(5, 50))[1:3]
    assert (len(some), some.best.shape) == (2, (2,))

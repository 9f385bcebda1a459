"""Gates in the interpreter, or on a GPU where there is one, against float64.

The interpreter cuts a bfloat16 off where a GPU rounds it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.gates import COLUMNS_AT_ONCE, add_gated, multiply_gate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLOSE = {torch.float32: 0.0, torch.float16: 2**-11}  # a rounding
if DEVICE.type == "cuda":
    CLOSE[torch.bfloat16] = 2**-8


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def assert_near(found: Tensor, due: Tensor) -> None:
    torch.testing.assert_close(found.double(), due, rtol=CLOSE[found.dtype] + 1e-5, atol=5e-6)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("size", [24, 128, COLUMNS_AT_ONCE + 40])
@pytest.mark.parametrize("silu", [False, True])
def test_a_product_with_a_gate(silu: bool, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    both = draw(5, 2 * size + 8, dtype=dtype, scale=4)
    x, gate = both[:, 8 : 8 + size], both[:, 8 + size :]
    gate[0, :3] = torch.tensor([-300.0, 300.0, 0.0])
    found, open_by = multiply_gate(x, gate, silu), gate.double()
    assert_near(found, x.double() * (F.silu(open_by) if silu else open_by.sigmoid()))
    assert torch.equal(multiply_gate(x.contiguous(), gate, silu), found)
    assert multiply_gate(x[:0], gate[:0], silu).shape == (0, size)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("hidden", [24, 2048])
def test_a_sum_with_what_a_gate_of_one_output_lets_through(hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x, out, routed = (draw(5, hidden, dtype=dtype) for _ in range(3))
    weight = draw(1, hidden, dtype=dtype, scale=2 * hidden**-0.5)
    due = routed.double() + (x.double() @ weight.double().T).sigmoid() * out.double()
    before = routed.clone()
    assert add_gated(out, routed, x, weight) is out
    assert_near(out, due)
    assert torch.equal(routed, before), "what the experts gave may be a buffer that is used again"
    assert add_gated(out[:0], routed[:0], x[:0], weight).shape == (0, hidden)

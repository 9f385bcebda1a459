"""Products with e4m3 matrices at the shapes of Qwen3.5 in bf16, eager and in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.fp8_linear.run import multiply
from dp_runtime.kernels.fp8_linear.tiles import LinearTile
from dp_runtime.layers.linear import Fp8Linear, load_projection
from dp_runtime.weights.dummy import DummyWeights
from dp_runtime.weights.fp8_blocks import BLOCK
from dp_runtime.weights.fp8_names import Fp8Names

SHAPES = [(12288, 128, 2048), (2048, 0, 4096), (20480, 128, 4096), (4096, 0, 1024), (1000, 24, 400)]
ROWS = (1, 7, 16, 17, 33, 64, 65, 128, 129, 200, 384, 385, 2048)


def load(outputs: int, rest: int, inputs: int) -> Fp8Linear:
    names = Fp8Names(exempt=("rest",))
    source = DummyWeights(0, torch.device("cuda"), torch.bfloat16, fp8=names)
    parts = {"model.a": outputs, **({"model.rest": rest} if rest else {})}
    linear = load_projection(source, parts, inputs)
    assert isinstance(linear, Fp8Linear)
    return linear


def exact(linear: Fp8Linear, x: Tensor) -> Tensor:
    by_input = linear.scales.repeat_interleave(BLOCK, 0)[: linear.shape[1]].t()
    values = linear.weight.float().view(len(linear.weight), -1, 4, 2, 2).transpose(2, 3)
    due = x.float() @ (values.reshape(linear.weight.shape) * by_input).t()
    return due if linear.rest is None else torch.cat([due, linear.rest(x).float()], 1)


def check(found: Tensor, due: Tensor) -> None:
    assert (found.float() - due).norm() / due.norm() < 4e-3  # bf16 rounds by up to 2^-9


@pytest.mark.parametrize(("outputs", "rest", "inputs"), SHAPES, ids=str)
def test_products_are_those_of_the_widened_matrix_eager_and_replayed(
    outputs: int, rest: int, inputs: int
) -> None:
    linear = load(outputs, rest, inputs)
    torch.backends.cuda.matmul.allow_tf32 = False
    for rows in ROWS:
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        found, due = linear(x), exact(linear, x)
        check(found, due)
        assert torch.equal(linear(x), found), "the order of a sum does not depend on who is last"
        assert not linear.counters.any()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = linear(x)
        x.copy_(torch.randn_like(x))
        due = exact(linear, x)
        for _ in range(3):
            replayed.fill_(float("nan"))
            graph.replay()
            check(replayed, due)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("split", [1, 4, 6])
@pytest.mark.parametrize("rows", [5, 40])
def test_a_row_of_nan_stays_alone(rows: int, split: int, tma: bool) -> None:
    linear = load(4096, 0, 2048)
    x = torch.randn(rows, 2048, device="cuda").bfloat16()
    tile = LinearTile(32, 64, 128, split, 4, 5, True, tma)

    def run() -> Tensor:
        out = x.new_empty(rows, 4096)
        return multiply(x, linear.weight, linear.scales, out, linear.counters, tile)

    clean = run()
    check(clean, exact(linear, x))
    x[3] = float("nan")
    found = run()
    assert found[3].isnan().all()
    others = torch.arange(rows, device="cuda") != 3
    assert torch.equal(found[others], clean[others])


def test_many_launches_in_a_row_agree() -> None:
    """Programs of one launch overlap with the next: their counters and sums are not mixed up."""
    layers = [load(2048, 0, 2048) for _ in range(4)]
    x = torch.randn(16, 2048, device="cuda").bfloat16() * 0.5

    def chain() -> Tensor:
        y = x
        for linear in layers * 8:
            y = torch.nn.functional.rms_norm(linear(y), (2048,))
        return y

    first = chain()
    assert all(torch.equal(chain(), first) for _ in range(20))

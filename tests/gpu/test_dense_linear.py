"""Products of few rows at the shapes of Qwen3 and Qwen3.5 in bf16, eager and in graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.dense_linear.run import multiply
from dp_runtime.kernels.dense_linear.tiles import DenseTile
from dp_runtime.kernels.norm import add_rms_norm

BF16 = torch.bfloat16
TILES = (
    DenseTile(16, 64, 128, 1, 4, 4),
    DenseTile(16, 64, 128, 4, 4, 4),
    DenseTile(32, 64, 128, 3, 4, 4),
    DenseTile(64, 64, 128, 4, 4, 3),
    DenseTile(128, 128, 64, 2, 8, 3),
    DenseTile(16, 32, 128, 1, 4, 4),
)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").mul_(0.5).to(BF16)


def new_counters() -> Tensor:
    return torch.zeros(4096, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(5120, 2048), (2048, 4096), (1000, 3056)], ids=str)
def test_products_are_exact_but_for_rounding_eager_and_replayed(
    shape: tuple[int, int], tile: DenseTile
) -> None:
    weight, counters = draw(*shape), new_counters()
    torch.backends.cuda.matmul.allow_tf32 = False
    for rows in (1, 16, 17, 64, 100):
        x, out = draw(rows, shape[1]), weight.new_empty(rows, shape[0])
        first = multiply(x, weight, out, counters, tile).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            multiply(x, weight, out, counters, tile)
        for _ in range(5):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, first), "the order of a sum does not depend on who is last"
        due = x.float() @ weight.float().t()
        assert (out.float() - due).norm() / due.norm() < 4e-3  # bf16 rounds by up to 2^-9
        assert not counters.any()


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_rows_that_the_kernel_before_writes_are_seen(tile: DenseTile) -> None:
    """Programs start while the norm still runs, and the norm while the product before does."""
    weights, scale = [draw(2048, 2048) for _ in range(8)], torch.ones(2048, device="cuda")
    x, counters = draw(16, 2048), new_counters()

    def chain(by_cublas: bool) -> Tensor:
        y = x
        for weight in weights:
            y = add_rms_norm(y, None, scale, 1e-6)
            out = torch.empty_like(y)
            y = F.linear(y, weight) if by_cublas else multiply(y, weight, out, counters, tile)
        return y

    chain(by_cublas=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(by_cublas=False)
    graph.replay()
    first, due = found.clone(), chain(by_cublas=True).float()
    assert (first.float() - due).norm() / due.norm() < 3e-2  # of eight roundings and more
    for _ in range(20):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, first)
    assert not counters.any()

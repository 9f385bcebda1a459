"""What a kernel that may overlap with the one before it waits for: the rule of triton_launch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait, overlaps

CALLS, SPINS = 100, 2000
DEVICE = torch.device("cuda")


@triton.jit
def spin_kernel(source, sink, SPINS: tl.constexpr):
    """Let the next kernel start at once, and go on for about a millisecond."""
    gdc_wait()
    gdc_launch_dependents()
    total = tl.load(source, volatile=True)
    for _ in range(SPINS):
        total += tl.load(source, volatile=True)
    tl.store(sink, total)


@triton.jit
def read_kernel(source, early, late):
    """Keep what is there before the wait, and after it."""
    tl.store(early, tl.load(source, volatile=True))
    gdc_wait()
    gdc_launch_dependents()
    tl.store(late, tl.load(source, volatile=True))


def stale_reads(value: Tensor, give: Callable[[int], object]) -> tuple[int, int]:
    """Have give(n) make value n, behind a kernel that spins; count other values that are read.

    Of those before the wait, and of those after it.
    """
    if not overlaps(DEVICE):
        pytest.skip("kernels overlap from compute capability 9.0 on")
    spun = torch.zeros(2, device=DEVICE)
    early, late = torch.zeros(CALLS, device=DEVICE), torch.zeros(CALLS, device=DEVICE)
    for n in range(CALLS):
        spin_kernel[(1,)](spun, spun[1:], SPINS=SPINS, launch_pdl=True)
        give(n + 1)
        read_kernel[(1,)](value, early[n:], late[n:], launch_pdl=True)
    due = torch.arange(1, CALLS + 1, device=DEVICE)
    return int((early != due).sum()), int((late != due).sum())


def test_a_copy_is_there_before_the_wait() -> None:
    value = torch.zeros(1, device=DEVICE)

    def copy(n: int) -> None:
        value.copy_(torch.full((1,), float(n)).pin_memory(), non_blocking=True)

    assert stale_reads(value, copy) == (0, 0)


def test_what_a_graph_wrote_is_there_before_the_wait() -> None:
    value, graph = torch.zeros(1, device=DEVICE), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        value.add_(1)
    assert stale_reads(value, lambda n: graph.replay()) == (0, 0)


def test_what_a_kernel_wrote_is_there_after_the_wait() -> None:
    value = torch.zeros(1, device=DEVICE)
    before, after = stale_reads(value, value.fill_)
    print(f"stale before the wait, behind an ordinary kernel: {before}")
    assert after == 0

"""The kernels of gated delta nets on a GPU, in the shape of Qwen3.5-397B, against float64.

`tests/dp_runtime/kernels/gated_delta` runs on a GPU too, with small heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.gated_delta.rows import HeadShape
from tests.dp_runtime.kernels.gated_delta.oracle import (
    Caches,
    Net,
    Rows,
    expected,
    run,
    sequences_of,
)

SHAPE = HeadShape(16, 64, 128, 128)
OUTPUTS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the largest value
STATES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def relative(found: Tensor, due: Tensor) -> float:
    return float((found.double() - due).abs().max() / due.abs().max().clamp(min=1e-2))


def check(net: Net, rows: Rows, outputs: Tensor, state: Tensor, first: int = 0) -> None:
    due, dtype = expected(net, rows), rows.qkv.dtype
    assert relative(outputs, due.outputs[first:]) < OUTPUTS[dtype]
    assert relative(state, due.state) < STATES[dtype]


def check_passes(dtype: torch.dtype, passes: Sequence[Sequence[int]], slots: list[int]) -> None:
    """Run passes of so many rows of each request, and compare each with its rows alone."""
    torch.manual_seed(0)
    net, count = Net.draw(SHAPE, 4, dtype), len(slots)
    lengths = [sum(of) for of in zip(*passes)]
    requests = [Rows.draw(SHAPE, n, dtype) for n in lengths]
    caches, done = Caches.dirty(net, max(slots) + 1), [0] * count
    found = [list[Tensor]() for _ in slots]
    for counts in passes:
        parts = [r[slice(at, at + n)] for r, at, n in zip(requests, done, counts)]
        of = sequences_of(counts, slots, [at == 0 for at in done])
        outputs = run(net, Rows.join(parts), caches, of).split(list(counts))
        for mine, new in zip(found, outputs):
            mine.append(new)
        done = [at + n for at, n in zip(done, counts)]
    for rows, outputs, slot in zip(requests, found, slots):
        check(net, rows, torch.cat(outputs), caches.states[slot])
    assert caches.states[0].isnan().all(), "the null slot is nobody's"


@pytest.mark.parametrize("dtype", list(OUTPUTS), ids=str)
def test_prompts_chunks_and_decodes(dtype: torch.dtype) -> None:
    check_passes(dtype, ([700, 1, 65, 4], [3, 64, 63, 130], [1, 1, 1, 1]), [5, 2, 7, 1])


def test_a_prompt_of_8192_rows() -> None:
    check_passes(torch.bfloat16, ([8192, 9], [1, 1]), [2, 1])


@pytest.mark.parametrize("count", [1, 37, 256])
def test_decodes_of_many_requests(count: int) -> None:
    slots = (1 + torch.randperm(count)).tolist()
    check_passes(torch.bfloat16, ([1 + i % 8 for i in range(count)], [1] * count), slots)


def test_a_slot_beyond_two_to_the_31_elements() -> None:
    check_passes(torch.bfloat16, ([70, 3], [1, 1]), [2050, 2049])


def test_drafts_have_the_bits_of_decodes() -> None:
    """All numbers of accepted drafts, in bf16, in passes of their own against decodes alone."""
    torch.manual_seed(1)
    net, drafts, slots = Net.draw(SHAPE, 4, torch.bfloat16), 7, [3, 1, 8, 2, 6, 4, 5, 7]
    caches, plain = Caches.dirty(net, 9, drafts), Caches.dirty(net, 9)
    prompts, accepted = [5] * 8, list(range(8))
    first = Rows.draw(SHAPE, 40, torch.bfloat16)
    stale = sequences_of(prompts, slots, [True] * 8, ([0] * 8, [7] * 8))
    run(net, first, caches, stale)
    run(net, first, plain, sequences_of(prompts, slots, [True] * 8))
    parts = [Rows.draw(SHAPE, 9, torch.bfloat16) for _ in slots]
    verified = Rows.join([part[slice(0, 8)] for part in parts])
    of = sequences_of([8] * 8, slots, [False] * 8, ([drafts] * 8, [0] * 8))
    found = run(net, verified, caches, of).split(8)
    last = [part[slice(1 + n, 2 + n)] for part, n in zip(parts, accepted)]
    of = sequences_of([1] * 8, slots, [False] * 8, ([0] * 8, accepted))
    ends = run(net, Rows.join(last), caches, of)
    for i, (part, slot) in enumerate(zip(parts, slots)):
        of = sequences_of([1], [slot], [False])
        due = [run(net, part[slice(j, j + 1)], plain, of)[0] for j in range(2 + accepted[i])]
        for j in range(1 + accepted[i]):
            assert torch.equal(found[i][j], due[j]), f"row {j} with {accepted[i]} accepted"
        assert torch.equal(ends[i], due[-1])
        assert torch.equal(caches.states[slot], plain.states[slot])

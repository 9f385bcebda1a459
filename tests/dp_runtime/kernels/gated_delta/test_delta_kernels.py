"""The kernels of the gated delta net in the interpreter, against its definition in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.gated_delta.gated_norm import gated_rms_norm
from dp_runtime.kernels.gated_delta.rows import HeadShape
from tests.dp_runtime.kernels.gated_delta.oracle import (
    DEVICE,
    Caches,
    Net,
    Rows,
    expected,
    run,
    sequences_of,
)

SMALL = HeadShape(1, 2, 16, 16)
SHAPES = [SMALL, HeadShape(2, 2, 16, 24), HeadShape(2, 6, 24, 40)]
CLOSE = {torch.float32: 2e-5, torch.float16: 2e-2}
LENGTHS = [1, 2, 3, 8, 9, 37, 63, 64, 65, 130]
FEW = settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])


def assert_close(found: Tensor, due: Tensor, dtype: torch.dtype) -> None:
    """Compare relative to the largest value: a sum's error is that of its terms."""
    size = max(float(due.abs().max()), 1e-2)
    torch.testing.assert_close(found.double(), due, atol=CLOSE[dtype] * size, rtol=0)


def assert_request(
    net: Net, rows: Rows, outputs: Tensor, caches: Caches, slot: int, due_rows: slice = slice(None)
) -> None:
    due, dtype = expected(net, rows), rows.qkv.dtype
    assert_close(outputs, due.outputs[due_rows], dtype)
    assert_close(caches.states[slot], due.state, dtype)
    assert torch.equal(caches.windows[slot, : net.width - 1].double(), due.window)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fresh_requests_of_any_length_on_dirty_slots(shape: HeadShape, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    net, lengths, slots = Net.draw(shape, 4, dtype), [1, 65, 0, 3, 9], [4, 1, 3, 5, 2]
    caches = Caches.dirty(net, 7)
    parts = [Rows.draw(shape, n, dtype) for n in lengths]
    outputs = run(net, Rows.join(parts), caches, sequences_of(lengths, slots, [True] * 5))
    for part, found, slot in zip(parts, outputs.split(lengths), slots):
        if len(part.qkv):
            assert_request(net, part, found, caches, slot)
    for slot in (0, 3, 6):
        assert caches.states[slot].isnan().all(), f"slot {slot} is nobody's, or without rows"
        assert caches.windows[slot].isnan().all()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length(length: int) -> None:
    torch.manual_seed(length)
    net, rows = Net.draw(SMALL, 4), Rows.draw(SMALL, length)
    caches = Caches.dirty(net, 2)
    outputs = run(net, rows, caches, sequences_of([length], [1], [True]))
    assert_request(net, rows, outputs, caches, 1)


@pytest.mark.parametrize("cut", [1, 2, 3, 37, 64, 65])
def test_a_prompt_in_chunks_is_that_prompt(cut: int) -> None:
    torch.manual_seed(cut)
    total = 2 * cut + 5 if cut > 3 else 11
    net, rows = Net.draw(SMALL, 4), Rows.draw(SMALL, total)
    caches, outputs = Caches.dirty(net, 3), []
    for start in range(0, total, cut):
        part = rows[slice(start, min(start + cut, total))]
        outputs.append(run(net, part, caches, sequences_of([len(part.qkv)], [2], [start == 0])))
    assert_request(net, rows, torch.cat(outputs), caches, 2)


def test_the_same_key_again_and_again_with_hardly_any_decay() -> None:
    """A prompt of one token repeated: powers of the chunk's system would reach 1e18."""
    torch.manual_seed(3)
    net = Net.draw(SMALL, 4)
    net.decay.fill_(-1e-4)
    one = Rows.draw(SMALL, 1)
    one.ba[:, : SMALL.num_v_heads] = 9.0
    rows = Rows(one.qkv.expand(130, -1).contiguous(), one.ba.expand(130, -1).contiguous())
    caches = Caches.dirty(net, 2)
    outputs = run(net, rows, caches, sequences_of([130], [1], [True]))
    assert_request(net, rows, outputs, caches, 1)


def test_a_decay_that_forgets_all_at_once_is_finite() -> None:
    """exp(-G) alone would overflow within a few rows."""
    torch.manual_seed(4)
    net, rows = Net.draw(SMALL, 4), Rows.draw(SMALL, 70)
    net.decay.fill_(-16.0)
    net.dt_bias.fill_(20.0)
    caches = Caches.dirty(net, 2)
    outputs = run(net, rows, caches, sequences_of([70], [1], [True]))
    assert_request(net, rows, outputs, caches, 1)


def test_small_decays_keep_their_digits() -> None:
    torch.manual_seed(5)
    net, rows = Net.draw(SMALL, 4), Rows.draw(SMALL, 3)
    net.dt_bias.copy_(torch.tensor([-13.0, -3.4]))
    net.decay.fill_(-(2.0**20))
    caches = Caches.dirty(net, 2)
    outputs = run(net, rows, caches, sequences_of([3], [1], [True]))
    assert_request(net, rows, outputs, caches, 1)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (4, 9, 70)], ids=str)
def test_padding_writes_no_slot(lengths: tuple[int, int, int]) -> None:
    torch.manual_seed(6)
    net, rows = Net.draw(SMALL, 4), Rows.draw(SMALL, sum(lengths))
    caches = Caches.dirty(net, 3)
    caches.states.zero_()
    caches.windows.zero_()
    before = caches.clone()
    outputs = run(net, rows, caches, sequences_of(lengths, [0, 2, 0], [False] * 3))
    middle = slice(lengths[0], lengths[0] + lengths[1])
    assert_request(net, rows[middle], outputs[middle], caches, 2)
    for slot in (0, 1):
        assert torch.equal(caches.states[slot], before.states[slot])
        assert torch.equal(caches.windows[slot], before.windows[slot])


def test_no_rows_at_all() -> None:
    net = Net.draw(SMALL, 4)
    caches = Caches.dirty(net, 2)
    assert run(net, Rows.draw(SMALL, 0), caches, sequences_of([], [], [])).shape == (0, 2, 16)


few_rows = st.sampled_from([0, 1, 2, 3, 8, 9, 37, 65])  # the interpreter is slow
requests = st.lists(st.tuples(few_rows, few_rows), min_size=1, max_size=3)


def _two_passes(cuts: Sequence[tuple[int, int]], slots: Sequence[int], seed: int) -> None:
    torch.manual_seed(seed)
    net = Net.draw(SHAPES[seed % 3], 2 + seed % 3)
    rows = [Rows.draw(net.shape, first + second) for first, second in cuts]
    caches, found = Caches.dirty(net, 8), [list[Tensor]() for _ in cuts]
    for turn in (0, 1):
        lengths = [cut[turn] for cut in cuts]
        parts = [row[slice(cut[0] * turn, cut[0] + cut[1] * turn)] for row, cut in zip(rows, cuts)]
        fresh = [turn == 0 or cut[0] == 0 for cut in cuts]
        outputs = run(net, Rows.join(parts), caches, sequences_of(lengths, slots, fresh))
        for mine, new in zip(found, outputs.split(lengths)):
            mine.append(new)
    for row, mine, slot in zip(rows, found, slots):
        if len(row.qkv):
            assert_request(net, row, torch.cat(mine), caches, slot)


@FEW
@given(requests, st.permutations(range(1, 8)), st.integers(0, 99))
def test_two_passes_of_any_requests(
    cuts: list[tuple[int, int]], slots: list[int], seed: int
) -> None:
    _two_passes(cuts, slots[: len(cuts)], seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, *LENGTHS])
@pytest.mark.parametrize("second", LENGTHS)
def test_two_passes_of_all_lengths(first: int, second: int) -> None:
    _two_passes([(first, second), (second, first), (1, second)], [3, 7, 1], first + second)


@pytest.mark.parametrize("wide", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_the_norm_and_its_gate(dtype: torch.dtype, wide: torch.dtype | None) -> None:
    torch.manual_seed(7)
    heads, dim = 18, 24
    x = (3 * torch.randn(5, heads, dim)).to(DEVICE, dtype)
    z = torch.randn(5, heads * dim + 3).to(DEVICE, dtype)[:, 3:]
    weight = torch.randn(dim).to(DEVICE, wide or dtype)
    quotient = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    due = quotient * weight.double() * F.silu(z.double()).unflatten(1, (heads, dim))
    found = gated_rms_norm(x, z, weight, 1e-6)
    assert found.dtype == dtype
    assert_close(found, due.flatten(1), dtype)
    assert gated_rms_norm(x[:0], z[:0], weight, 1e-6).shape == (0, heads * dim)

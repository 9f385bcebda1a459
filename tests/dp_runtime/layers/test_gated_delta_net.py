"""GatedDeltaNet: many requests in a pass, each with its own state, and the memory it takes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_runtime.core.recurrent_metadata import Drafts, RecurrentMetadata, Tracks
from dp_runtime.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetShape
from dp_runtime.layers.sequence_groups import REQUESTS_AT_ONCE
from dp_runtime.models.qwen3_5.decoder import load_split_inputs
from dp_runtime.weights.dummy import DummyWeights
from tests.dp_runtime.live_bytes import LiveBytes
from tests.dp_runtime.paged import CPU

SMALL = GatedDeltaNetShape(64, 2, 4, 16, 24, 4, 1e-6, torch.float32)
MAX_DRAFTS = 7
WIDE = GatedDeltaNetShape(256, 2, 8, 64, 64, 4, 1e-6, torch.float32)


def net(
    shape: GatedDeltaNetShape, slots: int, dtype: torch.dtype = torch.float32, max_drafts: int = 0
) -> GatedDeltaNet:
    weights = DummyWeights(0, CPU, dtype)
    state = shape.state(dtype, max_drafts).allocate(slots, CPU)
    for tensor in state:
        tensor.fill_(torch.nan)
    inputs = load_split_inputs(shape, weights, "x")
    return GatedDeltaNet.load(shape, weights, "x", inputs, state)


def sequences(
    lengths: list[int],
    slots: list[int],
    fresh: bool,
    drafts: Drafts | None = None,
    tracks: Tracks | None = None,
) -> RecurrentMetadata:
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return RecurrentMetadata(
        bounds,
        np.array(lengths, np.int32),
        torch.tensor(slots),
        torch.full((len(slots),), fresh),
        drafts,
        tracks,
    )


def drafts_of(num_drafts: list[int], num_accepted: list[int]) -> Drafts:
    return Drafts(*(torch.tensor(x, dtype=torch.int32) for x in (num_drafts, num_accepted)))


def tracks_of(slots: list[int], rows: list[int]) -> Tracks:
    on_host = np.array(rows, np.int32)
    return Tracks(torch.tensor(slots), torch.from_numpy(on_host), on_host)


def test_a_request_does_not_depend_on_those_beside_it() -> None:
    """More decodes and chunks in a pass than are run at once, in slots in any order."""
    torch.manual_seed(0)
    count = 2 * REQUESTS_AT_ONCE + 3
    lengths = [1 if i % 3 else 5 for i in range(count)]
    slots = (1 + torch.randperm(count)).tolist()
    layer, alone = net(SMALL, count + 1), net(SMALL, 2)
    begins = [torch.randn(4 + i % 3, 64) for i in range(count)]
    nexts = [torch.randn(length, 64) for length in lengths]
    firsts = [len(x) for x in begins]
    found = [
        layer(torch.cat(begins), sequences(firsts, slots, fresh=True)).split(firsts),
        layer(torch.cat(nexts), sequences(lengths, slots, fresh=False)).split(lengths),
    ]
    for i in range(count):
        for rows, fresh, both in ((begins, True, found[0]), (nexts, False, found[1])):
            due = alone(rows[i], sequences([len(rows[i])], [1], fresh))
            torch.testing.assert_close(both[i], due, atol=1e-6, rtol=1e-5)
    assert all(state[0].isnan().all() for state in layer.state), "the null slot is nobody's"


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rejected_drafts_leave_nothing_and_accepted_ones_are_run_again(
    state_dtype: torch.dtype,
) -> None:
    """Verifications of any lengths, chunks and plain rows in turn, each against its rows alone."""
    draw, count, passes = random.Random(0), REQUESTS_AT_ONCE + 3, 12
    shape = replace(SMALL, state_dtype=state_dtype)
    layer = net(shape, count + 1, max_drafts=MAX_DRAFTS)
    slots = draw.sample(range(1, count + 1), count)
    kept = [torch.zeros(0, 64) for _ in range(count)]  # rows that are tokens now
    accepted, seen = [0] * count, set[tuple[int, int]]()
    for number in range(passes):
        num_drafts, fed = list[int](), list[Tensor]()
        for _ in range(count):
            drafted = draw.randrange(MAX_DRAFTS + 1) if number else 0
            certain = 1 if drafted else draw.choice((1, 1, 2, 9, 70))
            num_drafts.append(drafted)
            fed.append(torch.randn(certain + drafted, 64))
        lengths = [len(x) for x in fed]
        own = sequences(lengths, slots, number == 0, drafts_of(num_drafts, accepted))
        found = layer(torch.cat(fed), own).split(lengths)
        tolerance = 1e-5 if state_dtype is torch.float32 else 3e-2
        for i in range(count):
            alone = net(SMALL, 2)
            whole = torch.cat((kept[i], fed[i]))
            due = alone(whole, sequences([len(whole)], [1], fresh=True))[len(kept[i]) :]
            torch.testing.assert_close(found[i], due, atol=tolerance, rtol=tolerance)
            seen.add((num_drafts[i], accepted[i]))
        accepted = [draw.randrange(drafted + 1) for drafted in num_drafts]
        ends = [lengths[i] - num_drafts[i] + accepted[i] for i in range(count)]
        kept = [torch.cat((kept[i], fed[i][: ends[i]])) for i in range(count)]
    assert len(seen) > 40, "most pairs of drafts and accepted ones before them"
    assert all(state[0].isnan().all() for state in layer.state), "the null slot is nobody's"


def test_a_fresh_request_reads_no_count_of_another() -> None:
    layer, alone = net(SMALL, 2, max_drafts=3), net(SMALL, 2)
    x = torch.randn(5, 64)
    found = layer(x, sequences([5], [1], True, drafts_of([2], [3])))
    due = alone(x, sequences([5], [1], True))
    torch.testing.assert_close(found, due, atol=1e-6, rtol=1e-5)


def test_one_verification_writes_each_state_once_however_many_drafts() -> None:
    """The state behind a verification is that before its drafts."""
    x = torch.randn(9, 64)
    drafted, plain = net(SMALL, 2, max_drafts=3), net(SMALL, 2)
    for layer, rows, drafts in ((drafted, 9, drafts_of([3], [0])), (plain, 6, None)):
        layer(x[:rows], sequences([rows], [1], True, drafts))
    torch.testing.assert_close(drafted.state[1][1], plain.state[1][1], atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(drafted.state[0][1, :3], plain.state[0][1])
    assert drafted.state[0][1].isfinite().all(), "and the drafts' inputs behind it"


def test_a_tracked_state_is_that_of_the_rows_before_it() -> None:
    """After accepted drafts too: who goes on from it goes on as the request itself does."""
    torch.manual_seed(2)
    layer, alone = net(SMALL, 6, max_drafts=3), net(SMALL, 2)
    begin, chunk, more = torch.randn(6, 64), torch.randn(140, 64), torch.randn(5, 64)
    layer(begin, sequences([6], [1], True, drafts_of([3], [0])))
    of = sequences([140, 3], [1, 2], False, drafts_of([0, 0], [2, 0]), tracks_of([4, 0], [128, 0]))
    layer(torch.cat((chunk, torch.randn(3, 64))), of)
    found = layer(more, sequences([5], [4], False, drafts_of([0], [0])))
    whole = torch.cat((begin[:5], chunk[:128], more))
    due = alone(whole, sequences([len(whole)], [1], True))[-5:]
    torch.testing.assert_close(found, due, atol=1e-5, rtol=1e-5)
    assert all(state[[0, 3, 5]].isnan().all() for state in layer.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["small", "wide"])
def test_the_memory_of_verifications_is_counted(
    shape: GatedDeltaNetShape, dtype: torch.dtype
) -> None:
    rows, peaks = 512, list[int]()
    for length, drafted in ((8, 7), (2, 1), (1, 0)):
        count = rows // length
        layer = net(shape, count + 1, dtype, MAX_DRAFTS)
        for tensor in layer.state:
            tensor.zero_()
        x = torch.randn(rows, shape.hidden_size).to(dtype)
        drafts = drafts_of([drafted] * count, [MAX_DRAFTS] * count)
        plan = sequences([length] * count, list(range(1, count + 1)), False, drafts)
        with torch.inference_mode(), LiveBytes() as live:
            layer(x, plan)
        peaks.append(live.peak)
    predicted = layer.activation_bytes(rows)
    print(f"predicted {predicted}, live {peaks}")
    assert max(peaks) < predicted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["small", "wide"])
def test_the_memory_of_a_call_is_counted(shape: GatedDeltaNetShape, dtype: torch.dtype) -> None:
    rows, peaks = 512, list[int]()
    cases: list[tuple[list[int], Tracks | None]] = [
        ([500, 12], None), ([32] * 16, None), ([63] * 8 + [8], None), ([8] * 64, None),
        ([1] * 512, None), ([500, 12], tracks_of([3, 0], [448, 0])), ([512], tracks_of([2], [64])),
    ]  # fmt: skip
    for lengths, tracks in cases:
        layer = net(shape, len(lengths) + 2, dtype)
        x: Tensor = torch.randn(rows, shape.hidden_size).to(dtype)
        plan = sequences(lengths, list(range(1, len(lengths) + 1)), True, tracks=tracks)
        with torch.inference_mode(), LiveBytes() as live:
            layer(x, plan)
        peaks.append(live.peak)
    predicted = layer.activation_bytes(rows)
    print(f"predicted {predicted}, live {peaks}")
    assert max(peaks) < predicted < 1.5 * max(peaks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_are_the_plain_layer(dtype: torch.dtype) -> None:
    """Prompts, a chunk that continues one, decodes and rows of nobody, on slots of NaN."""
    pytest.importorskip("triton", reason="triton is not installed")
    torch.manual_seed(1)
    plain, kernels, tracks = (
        net(SMALL, 6, dtype),
        net(SMALL, 6, dtype),
        tracks_of([5, 0, 0], [64, 0, 0]),
    )
    for lengths, fresh in (([70, 3, 9], True), ([1, 12, 1], False), ([1, 1, 1], False)):
        of = sequences(lengths, [4, 1, 3], fresh, tracks=tracks if lengths[0] == 70 else None)
        rows = torch.randn(sum(lengths), SMALL.channels + SMALL.v_size + 8).to(dtype)
        qkv, z, ba = rows.tensor_split([SMALL.channels, SMALL.channels + SMALL.v_size], 1)
        due, found = plain.run_plain(qkv, z, ba, of), kernels.run_kernels(qkv, z, ba, of)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found, due, atol=tolerance, rtol=tolerance)
        for mine, other in zip(kernels.state, plain.state):
            torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert all(state[0].isnan().all() for state in kernels.state), "the null slot is nobody's"


class NoLaunch:
    """A kernel that does nothing: in the interpreter a launch copies its tensors."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


@pytest.mark.parametrize("max_drafts", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_of_kernels_is_counted(
    dtype: torch.dtype, max_drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = "dp_runtime.kernels.gated_delta"
    for module in ("convolution", "recurrent", "chunked", "gated_norm"):
        for name in [
            n for n in vars(import_module(f"{kernels}.{module}")) if n.endswith("_kernel")
        ]:
            monkeypatch.setattr(f"{kernels}.{module}.{name}", NoLaunch())
    rows, peaks = 512, list[int]()
    for lengths in ([500, 12], [1] * 512, [9] * 56 + [8]):
        layer = replace(net(WIDE, len(lengths) + 1, dtype, max_drafts), in_kernels=True)
        none = [0] * len(lengths)
        drafts = drafts_of(none, none) if max_drafts else None
        of = sequences(lengths, list(range(1, len(lengths) + 1)), True, drafts)
        x = torch.randn(rows, WIDE.channels + WIDE.v_size + 16).to(dtype)
        assert len(of.row_blocks.blocks), "tables are made once for all layers"
        qkv, z, ba = x.tensor_split([WIDE.channels, WIDE.channels + WIDE.v_size], 1)
        with torch.inference_mode(), LiveBytes() as live:
            layer.run_kernels(qkv, z, ba, of)
        peaks.append(live.peak - layer.replay_bytes(len(lengths)))
    predicted = layer.kernel_bytes(rows)
    print(f"predicted {predicted}, live {peaks}")
    assert max(peaks) <= predicted < 1.1 * max(peaks)
    assert replace(layer, in_kernels=False).replay_bytes(rows) == 0

"""GatedDeltaNet: many requests in a pass, each with its own state, and the memory it takes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_runtime.core.recurrent_metadata import RecurrentMetadata
from dp_runtime.layers.gated_delta_net import REQUESTS_AT_ONCE, GatedDeltaNet, GatedDeltaNetShape
from dp_runtime.models.qwen3_5.decoder import load_split_inputs
from dp_runtime.weights.dummy import DummyWeights
from tests.dp_runtime.live_bytes import LiveBytes
from tests.dp_runtime.paged import CPU

SMALL = GatedDeltaNetShape(64, 2, 4, 16, 24, 4, 1e-6, torch.float32)
WIDE = GatedDeltaNetShape(256, 2, 8, 64, 64, 4, 1e-6, torch.float32)


def net(shape: GatedDeltaNetShape, slots: int, dtype: torch.dtype = torch.float32) -> GatedDeltaNet:
    weights = DummyWeights(0, CPU, dtype)
    state = shape.state(dtype).allocate(slots, CPU)
    for tensor in state:
        tensor.fill_(torch.nan)
    inputs = load_split_inputs(shape, weights, "x")
    return GatedDeltaNet.load(shape, weights, "x", inputs, state)


def sequences(lengths: list[int], slots: list[int], fresh: bool) -> RecurrentMetadata:
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return RecurrentMetadata(
        bounds, np.array(lengths, np.int32), torch.tensor(slots), torch.full((len(slots),), fresh)
    )


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["small", "wide"])
def test_the_memory_of_a_call_is_counted(shape: GatedDeltaNetShape, dtype: torch.dtype) -> None:
    rows, peaks = 512, list[int]()
    for lengths in ([500, 12], [32] * 16, [63] * 8 + [8], [8] * 64, [1] * 512):
        layer = net(shape, len(lengths) + 1, dtype)
        x: Tensor = torch.randn(rows, shape.hidden_size).to(dtype)
        plan = sequences(lengths, list(range(1, len(lengths) + 1)), fresh=True)
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
    plain, kernels = net(SMALL, 6, dtype), net(SMALL, 6, dtype)
    for lengths, fresh in (([70, 3, 9], True), ([1, 12, 1], False), ([1, 1, 1], False)):
        of = sequences(lengths, [4, 1, 3], fresh)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_of_kernels_is_counted(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
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
        layer = net(WIDE, len(lengths) + 1, dtype)
        of = sequences(lengths, list(range(1, len(lengths) + 1)), fresh=True)
        x = torch.randn(rows, WIDE.channels + WIDE.v_size + 16).to(dtype)
        assert len(of.row_blocks.blocks), "tables are made once for all layers"
        qkv, z, ba = x.tensor_split([WIDE.channels, WIDE.channels + WIDE.v_size], 1)
        with torch.inference_mode(), LiveBytes() as live:
            layer.run_kernels(qkv, z, ba, of)
        peaks.append(live.peak)
    predicted = layer.kernel_bytes(rows)
    print(f"predicted {predicted}, live {peaks}")
    assert max(peaks) <= predicted < 1.1 * max(peaks)

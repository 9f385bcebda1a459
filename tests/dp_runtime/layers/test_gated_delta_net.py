"""GatedDeltaNet: many requests in a pass, each with its own state, and the memory it takes."""

from __future__ import annotations

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

"""What a draft model's forward is predicted to take, against what its tensors take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collectives.in_process import InProcessGroup
from dp_runtime.layers.moe import RankSharding
from dp_runtime.models.causal_lm import PassInputs
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.parallel.exchange import PaddedExchange
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.speculative.draft import build_draft, read_draft_config
from dp_runtime.weights.loader import open_weights
from tests.checkpoints import add_mtp, eagle3_checkpoint, tiny_checkpoint
from tests.dp_runtime.live_bytes import LiveBytes
from tests.dp_runtime.paged import CPU

ROWS = 700
EAGLE: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle3 wide attention": {"num_attention_heads": 24},
    "eagle3 wide mlp": {"intermediate_size": 700},
}


def frugal_attention(q: Tensor, k: Tensor, v: Tensor, metadata: object) -> Tensor:
    """Copies what it gets, as a GPU's kernels do."""
    copies = q.clone(), k.clone(), v.clone()
    return copies[0].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mtp", *EAGLE])
def test_a_draft_s_forward_is_predicted(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = add_mtp(tiny_checkpoint(tmp_path / "target"))
    head = eagle3_checkpoint(tmp_path / "head", path, **EAGLE[name]) if name in EAGLE else None
    config, sharding = read_model_config(str(path)), RankSharding("ep", 0, 1)
    weights = open_weights(str(path), "dummy", 0, dtype, CPU)
    target = build_model(config, weights, sharding, lambda layer: frugal_attention)  # type: ignore[arg-type, return-value]
    draft = build_draft(
        read_draft_config(str(path), config, head and str(head)), target, weights, sharding,
        lambda layer: frugal_attention, "torch",  # type: ignore[arg-type, return-value]
    )  # fmt: skip
    ids, none = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    inputs = PassInputs(ids, ids, none, torch.zeros(0, 0), torch.randn(ROWS, 64).to(dtype))
    plan = PaddingPlan.for_mode(PaddingMode.MAX_LEN, (ROWS,))
    exchange = PaddedExchange(plan, InProcessGroup(1, 1.0).collective(0), False)
    with torch.inference_mode(), LiveBytes() as live:
        out = draft.forward(inputs, None, exchange)  # type: ignore[arg-type]
    assert out.last.dtype == out.features.dtype == dtype
    predicted = draft.forward_bytes(ROWS, ROWS, False)
    print(f"{name}: predicted {predicted}, live {live.peak}")
    assert 0.95 * live.peak < predicted < 1.25 * live.peak
    with torch.inference_mode(), LiveBytes() as live:
        draft.logits(out.last)
    assert live.peak == draft.logits_bytes(ROWS)

"""What a draft model's forward is predicted to take, against what its tensors take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from collectives.in_process import InProcessGroup
from dp_runtime.layers.moe import RankSharding
from dp_runtime.models.causal_lm import PassInputs, PassPlan
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.parallel.row_exchange import PaddedExchange
from dp_runtime.speculative.draft import build_draft, read_draft_config
from dp_runtime.weights.loader import open_weights
from tests.checkpoints import add_mtp, eagle3_checkpoint, tiny_checkpoint
from tests.dp_runtime.live_bytes import LiveBytes, attend_frugally
from tests.dp_runtime.paged import CPU, backend_over, metadata_of, paged_batch, random_page_table

ROWS, PAGE_SIZE, NUM_PAGES = 700, 64, 14
EAGLE: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle3 wide attention": {"num_attention_heads": 24},
    "eagle3 wide mlp": {"intermediate_size": 700},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mtp", *EAGLE])
def test_a_draft_s_forward_is_predicted(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend_frugally(monkeypatch)
    path = add_mtp(tiny_checkpoint(tmp_path / "target"))
    head = eagle3_checkpoint(tmp_path / "head", path, **EAGLE[name]) if name in EAGLE else None
    config, sharding = read_model_config(str(path)), RankSharding("ep", 0, 1)
    weights = open_weights(str(path), "dummy", 0, dtype, CPU)
    target = build_model(
        config, weights, sharding, backend_over(config, NUM_PAGES, PAGE_SIZE, dtype)
    )
    draft_config = read_draft_config(str(path), config, str(head) if head else None)
    own = backend_over(draft_config, NUM_PAGES, PAGE_SIZE, dtype)
    draft = build_draft(draft_config, target, weights, sharding, own, "torch")
    table, _ = random_page_table([ROWS], PAGE_SIZE, np.random.default_rng(0))
    batch = paged_batch([(ROWS, ROWS)], table, PAGE_SIZE)
    sequences = PassPlan(draft.backend.plan(metadata_of(batch, NUM_PAGES, PAGE_SIZE)))
    ids = torch.zeros(ROWS, dtype=torch.int64)
    inputs = PassInputs(ids, ids, torch.randn(ROWS, 64).to(dtype))
    plan = PaddingPlan.for_mode(PaddingMode.MAX_LEN, (ROWS,))
    exchange = PaddedExchange(plan, InProcessGroup(1, 1.0).collective(0), False)
    with torch.inference_mode(), LiveBytes() as live:
        out = draft.forward(inputs, sequences, exchange)
    assert out.last.dtype == out.aux_hidden_states.dtype == dtype
    predicted = draft.forward_bytes(ROWS, ROWS, False)
    print(f"{name}: predicted {predicted}, live {live.peak}")
    assert 0.95 * live.peak < predicted < 1.25 * live.peak
    with torch.inference_mode(), LiveBytes() as live:
        draft.logits(out.last)
    assert live.peak == draft.logits_bytes(ROWS)

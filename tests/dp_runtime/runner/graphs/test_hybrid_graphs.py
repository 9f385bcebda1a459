"""Graphs of models with recurrent layers: same tokens as eager steps, and no other's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.dp_runtime.runner.hybrid_ranks import check_served, serve
from tests.dp_runtime.runner.stand_ins import use_stand_ins
from tests.hybrid_checkpoints import add_mtp, agree_in_part, hybrid_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = ["linear_attention", "full_attention"]
    path = hybrid_checkpoint(
        tmp_path_factory.mktemp("hybrid"), num_hidden_layers=2, layer_types=kinds, num_experts=4
    )
    return agree_in_part(add_mtp(path))


@pytest.mark.parametrize(
    ("num_drafts", "fields", "interprets"),
    [
        pytest.param(0, {}, False, marks=pytest.mark.slow),
        pytest.param(3, {}, False, marks=pytest.mark.slow),
        (2, {"overlap": False, "speculative_adaptive": True}, False),
        pytest.param(0, {}, True, marks=pytest.mark.slow),
        pytest.param(3, {}, True, marks=pytest.mark.slow),
    ],
)
def test_graphs_give_the_tokens_of_eager_steps_8_9(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_drafts: int,
    fields: dict[str, Any],
    interprets: bool,
) -> None:
    use_stand_ins(monkeypatch, interprets=interprets)
    with torch.inference_mode():
        own = checkpoint, monkeypatch
        eager = serve(*own, captures=False, num_drafts=0)
        served = serve(*own, captures=True, num_drafts=num_drafts, **fields)
    assert served.tokens == eager.tokens
    assert served.experts == eager.experts
    assert not eager.replays
    check_served(served, num_drafts)

"""Models with gated delta nets, served by an engine, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dp_runtime import Engine, EngineConfig
from dp_runtime.startup.rank_plan import plan_rank
from tests.hybrid_checkpoints import NEXT, TEXT, VISION, hybrid_checkpoint, oracle
from tests.product_cases import DIMENSIONS, Case, covering_rows, every
from tests.reference import Reference
from tests.serving import check_load

HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (TEXT, {"num_experts": 7}),
    "vision": (VISION, {"tie_word_embeddings": True}),
    "next": (NEXT, {"num_hidden_layers": 3, "mlp_only_layers": [1], "intermediate_size": 56,
                    "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
}  # fmt: skip
DECIDE = ("checkpoint", "dp_size", "load", "max_num_tokens")
ROWS = covering_rows(
    DIMENSIONS | {"checkpoint": tuple(HYBRIDS)},
    [*every(2, DECIDE), ("overlap", "few_pages", "extra"), ("dp_size", "moe_sharding", "padding")],
)
CASES = [Case(**row) for row in ROWS]


@pytest.fixture(scope="module")
def hybrid_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    @cache
    def make(name: str) -> Reference:
        architecture, overrides = HYBRIDS[name]
        path = hybrid_checkpoint(tmp_path_factory.mktemp(name), architecture, **overrides)
        return HybridReference(path)

    return make


class HybridReference(Reference):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.model = oracle(path)  # the class that config.json names


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hybrids(case: Case, hybrid_of: Callable[[str], Reference]) -> None:
    reference = hybrid_of(case.checkpoint)
    with Engine(case.config(str(reference.path))) as engine:
        check_load(engine, reference, case.items, case.extra)
        if case.preempts:
            assert engine.report().preemptions > 0


def test_cases_preempt_abort_and_chunk() -> None:
    assert 20 <= len(CASES) <= 60
    assert {case.dp_size for case in CASES if case.preempts} == {1, 2, 3, 4}
    assert any(case.preempts and case.extra == "aborts" and case.overlap for case in CASES)


def test_what_is_not_served_yet_is_said(hybrid_of: Callable[[str], Reference]) -> None:
    path = str(hybrid_of("text").path)
    with pytest.raises(ValueError, match=r"^speculative_draft_model: None is not allowed"):
        plan_rank(EngineConfig(path, speculative_num_steps=2), 0, "cpu")

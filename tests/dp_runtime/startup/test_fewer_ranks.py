"""Memory is set aside for the experts of ranks that may be missing."""

from dataclasses import replace
from pathlib import Path

import pytest

from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.startup.inspection import describe
from dp_runtime.startup.rank_plan import sketch_rank
from tests.checkpoints import tiny_checkpoint


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(str(tiny_checkpoint(tmp_path)), dp_size=4, max_model_len=64)


def test_what_is_set_aside_is_what_a_rank_takes_over(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = Membership.first(2)
    own = sketch_rank(config, 0, "cpu").memory.weights
    more = max(sketch_rank(config, rank, "cpu", fewer).memory.weights for rank in range(2)) - own
    assert more > 0
    page = sketch_rank(config, 0, "cpu").page_bytes
    scarce = sketch_rank(config, 0, "cpu").memory.total + 3 * page
    monkeypatch.setattr("dp_runtime.startup.memory_plan.rank_memory", lambda *given: scarce)
    free, kept = (
        sketch_rank(replace(config, min_dp_size=least, kv_memory_fraction=1.0), 0, "cpu").pages
        for least in (4, 2)
    )
    assert 0 < free.num_pages - kept.num_pages <= -(-more // page) + 1


def test_inspect_says_how_few_ranks_can_hold_the_experts(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_rows = replace(config, max_num_tokens=8, max_num_requests=2)
    pages = sketch_rank(few_rows, 0, "cpu").pages.num_pages
    kept = replace(few_rows, num_pages=pages)
    needed = {
        size: sketch_rank(kept, 0, "cpu", Membership.first(size)).memory.total for size in (1, 2, 3)
    }
    assert needed[1] > needed[2] > needed[3]
    for memory, told in (
        (needed[1] + needed[2], "3, 2, 1 can hold the experts; min_dp_size is 4"),
        ((needed[1] + needed[2]) // 2, "3, 2 can hold the experts; 1 can not; min_dp_size is 4"),
        (needed[3] // 2, "3, 2, 1 can not; min_dp_size is 4"),
    ):
        look = lambda *given, found=memory: found  # noqa: E731
        monkeypatch.setattr("dp_runtime.startup.memory_plan.rank_memory", look)
        assert f"fewer      of the ranks {told}" in describe(kept, "cpu")


def test_more_than_all_ranks_can_not_be_the_fewest(config: EngineConfig) -> None:
    with pytest.raises(ValueError, match="min_dp_size: 5 is not allowed; at most dp_size 4"):
        replace(config, min_dp_size=5)

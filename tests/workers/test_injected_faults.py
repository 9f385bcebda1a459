"""Every kind of fault that `inject` makes: what it costs, and whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dp_runtime import Engine, FinishReason, SamplingParams
from dp_runtime.errors import RankFailed, RequestFailed
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.serving import check_pages_free
from tests.workers.disturbed import WAIT_S, alike, recovering, served
from tests.workers.test_watch import nothing_left

GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("injected")))


def epochs(engine: Engine) -> set[int]:
    return {rank.epoch for rank in engine.health()}


@pytest.mark.slow
def test_a_rank_at_fault_is_replaced_and_no_other(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each epoch one fault; the last epoch has none, and says what is right."""
    monkeypatch.setattr("dp_runtime.engine.routing.relocation.MAX_REPLAYS", 100)
    faults = [(1, "raise"), (2, "kill"), (0, "mismatch"), (1, "stop")]
    inject = ";".join(
        f"rank={rank},step=10,kind={kind},epoch={epoch}"
        for epoch, (rank, kind) in enumerate(faults)
    )
    with nothing_left(), recovering(model, "local", inject=inject) as engine:
        disturbed = alike(served(engine, 5, lambda: None))
        assert epochs(engine) == {len(faults)}
        assert disturbed == alike(served(engine, 5, lambda: None))
        assert epochs(engine) == {len(faults)}
        group: Any = engine._core._group
        lost = [one.dp_ranks for one in group._supervisor._recovery._history]
        replaced = [() if kind == "mismatch" else (rank,) for rank, kind in faults]
        assert lost == replaced
        check_pages_free(engine)


@pytest.mark.parametrize("num_drafts", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_request_at_fault_fails_alone(model: Path, num_drafts: int) -> None:
    inject = "rank=1,step=0,kind=oom;rank=1,step=3,kind=nan,epoch=1"
    with recovering(
        model, "thread", inject=inject, speculative_num_steps=num_drafts, overlap=True
    ) as engine:
        kept = [engine.submit([5, 6, rank], GREEDY, dp_rank=rank) for rank in (0, 2)]
        group: Any = engine._core._group
        handles = [seat.handle for seat in group._ranks.seats]
        with pytest.raises(RequestFailed, match="OutOfMemoryError: no memory at step 0 of rank 1"):
            engine.submit([7, 8], GREEDY, dp_rank=1).result(WAIT_S)
        with pytest.raises(RequestFailed, match="NaN or infinite logits"):
            engine.submit([7, 8], GREEDY, dp_rank=1).result(WAIT_S)
        expected = engine.generate([[5, 6, 0], [5, 6, 2]], GREEDY)
        assert [one.result(WAIT_S).token_ids for one in kept] == alike(expected)
        assert epochs(engine) == {1}
        assert handles == [seat.handle for seat in group._ranks.seats]
        check_pages_free(engine)


@pytest.mark.slow
def test_what_is_only_late_costs_nothing_else(model: Path) -> None:
    inject = "rank=0,step=2,kind=slow,seconds=0.3;rank=2,step=0,kind=drop_wakeup"
    with recovering(model, "thread", inject=inject) as engine:
        assert len(engine.submit([1, 2], GREEDY, dp_rank=2).result(WAIT_S).token_ids) == 60
        served(engine, 6, lambda: None)
        assert epochs(engine) == {0}


def test_a_step_without_end_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank answers all the while, and there is no other that waits for it.

    A request that is late meanwhile ends; its pages are free once the rank steps again.
    """
    monkeypatch.setattr("workers.stages.rank_stages.LEAVE_S", 0.2)
    monkeypatch.setattr("workers.supervision.watch.MIN_SILENCE_S", 0.5)
    inject = "rank=0,step=8,kind=slow,seconds=4"
    fields: dict[str, Any] = {"dp_size": 1, "step_timeout_s": 1.0, "inject": inject}
    with nothing_left(), recovering(model, "thread", **fields) as engine:
        handle = engine.submit([7, 8], GREEDY)
        late = engine.submit([7, 8], replace(GREEDY, timeout_s=0.5)).result(WAIT_S)
        assert late.finish_reason is FinishReason.TIMEOUT
        assert len(late.token_ids) < 60
        tokens = handle.result(WAIT_S).token_ids
        assert epochs(engine) == {1}
        assert tokens == engine.generate([[7, 8]], GREEDY)[0].token_ids
        assert len(tokens) == 60
        check_pages_free(engine)


def test_requests_that_end_epochs_do_not_end_the_engine(model: Path) -> None:
    """More of them than ranks may be replaced, one of which is replaced after them."""
    count = 4
    memory = [f"rank=1,step=0,kind=oom,epoch={epoch}" for epoch in range(count)]
    inject = ";".join([*memory, f"rank=0,step=0,kind=raise,epoch={count}"])
    with recovering(model, "thread", inject=inject, max_recoveries=1) as engine:
        kept = engine.submit([5, 6], GREEDY, dp_rank=2)
        for _ in range(count):
            with pytest.raises(RequestFailed, match="OutOfMemoryError"):
                engine.submit([7, 8], GREEDY, dp_rank=1).result(WAIT_S)
        expected = engine.generate([[5, 6]], GREEDY)
        assert kept.result(WAIT_S).token_ids == expected[0].token_ids
        assert epochs(engine) == {count + 1}
        check_pages_free(engine)


def test_faults_without_end_are_one_error_with_their_history(model: Path) -> None:
    """No rank is lost by them, and no request ends: they would go on for ever."""
    inject = ";".join(f"rank=1,step=2,kind=mismatch,epoch={epoch}" for epoch in range(9))
    with recovering(model, "thread", inject=inject, max_recoveries=2) as engine:
        handle = engine.submit([5, 6], GREEDY)
        with pytest.raises(RankFailed, match="recovered within 60 s before: ") as failed:
            handle.result(WAIT_S)
        assert str(failed.value).count("no rank (") == 2

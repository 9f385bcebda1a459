"""Graphs are captured while eager steps already serve: at the same places on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.in_process import InProcessGroup
from dp_runtime.core.step_program import Pass
from dp_runtime.errors import CollectiveAborted
from dp_runtime.parallel.execution_plan import ExecutionMode
from dp_runtime.runner import step_loop
from dp_runtime.runner.graphs.pending_capture import PendingCapture
from dp_runtime.runner.step_runner import CapturedGraphs
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.collectives.ranks import Ranks
from tests.dp_runtime.runner.capturing_ranks import Arrivals, Seen, capturing_case

NUM_STEPS = 40
NEVER: Arrivals = ({}, {}, {})
UNEVEN: Arrivals = ({0: 2, 20: 1}, {}, {2: 1, 9: 2, 25: 2})
BY_GRAPH = {ExecutionMode.GRAPH, ExecutionMode.PIECEWISE}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("capture")))


@pytest.fixture(autouse=True)
def short_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are threads set it in this process."""
    monkeypatch.setattr(step_loop, "IDLE_S", step_loop.IDLE_S)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


def case(collective: Any, board: Any, fields: dict[str, Any], *arguments: Any) -> Seen:
    return capturing_case(collective, board, *arguments, **fields)


def check_captured(seen: list[Seen]) -> int:
    """Check that all ranks captured alike, from the first step on; return the step after it."""
    first = seen[0]
    for other in seen[1:]:
        assert other.places == first.places
        assert other.plans == first.plans
        assert other.progress == first.progress
    steps = [step for step, _ in first.places]
    total = first.progress[0][1]
    assert [number for _, number in first.places] == list(range(total))
    assert first.progress == [(done, total) for done in range(total + 1)]
    assert sorted({*steps}) == steps, "one in each step"
    missing = {*range(steps[-1])} - {*steps}
    # The step after the last of a part finds none, and the next is planned by its graphs.
    assert len(missing) == 1, "there are two parts"
    (between,) = missing
    assert not any(BY_GRAPH & {*modes} for modes in first.plans[: between + 1])
    assert not any(ExecutionMode.PIECEWISE in modes for modes in first.plans[: steps[-1] + 2])
    return steps[-1] + 2


@pytest.mark.parametrize(
    ("kind", "overlap", "num_drafts"),
    [
        ("in_process", False, 0),
        ("in_process", True, 2),
        ("shared_memory", True, 0),
        ("shared_memory", False, 2),
    ],
)
def test_ranks_capture_a_unit_a_step_and_then_replay(
    ranks: Ranks, checkpoint: Path, kind: str, overlap: bool, num_drafts: int
) -> None:
    fields = {"overlap": overlap, "speculative_num_steps": num_drafts}
    plain = ranks.run(kind, 3, case, fields, checkpoint, UNEVEN, NUM_STEPS, False)
    seen = ranks.run(kind, 3, case, fields, checkpoint, UNEVEN, NUM_STEPS)
    switched = check_captured(seen)
    assert any(BY_GRAPH & {*modes} for modes in seen[0].plans[switched:])
    assert [rank.tokens for rank in seen] == [rank.tokens for rank in plain]
    assert [sorted(map(len, rank.tokens.values())) for rank in seen] == [[5] * 3, [], [5] * 5]


@settings(max_examples=5, deadline=None)
@given(
    arrivals=st.lists(
        st.dictionaries(st.integers(0, 25), st.integers(1, 3), max_size=4), min_size=3, max_size=3
    ),
    overlap=st.booleans(),
    num_drafts=st.sampled_from([0, 1]),
)
def test_whatever_arrives_all_ranks_capture_and_replay_in_the_same_steps(
    checkpoint: Path, arrivals: Arrivals, overlap: bool, num_drafts: int
) -> None:
    fields = {"overlap": overlap, "speculative_num_steps": num_drafts}
    check_captured(Ranks().run("in_process", 3, case, fields, checkpoint, arrivals, NUM_STEPS))


@pytest.mark.parametrize("kind", ["in_process", "shared_memory"])
def test_idle_ranks_capture_without_a_nap(ranks: Ranks, checkpoint: Path, kind: str) -> None:
    seen = ranks.run(kind, 3, case, {}, checkpoint, NEVER, NUM_STEPS)
    switched = check_captured(seen)
    assert {*seen[0].plans} == {(ExecutionMode.EMPTY,)}
    assert all(rank.naps[0] == switched for rank in seen), "then they sleep"


@pytest.mark.parametrize("kind", ["in_process", "shared_memory"])
@pytest.mark.parametrize("arrivals", [NEVER, UNEVEN])
def test_ranks_stop_in_the_midst_of_it(
    ranks: Ranks, checkpoint: Path, kind: str, arrivals: Arrivals
) -> None:
    seen = ranks.run(kind, 3, case, {"overlap": True}, checkpoint, arrivals, 2)
    assert {rank.error for rank in seen} == {""}
    assert [{step for step, _ in rank.places} for rank in seen] == [{0, 1}] * 3


@pytest.mark.parametrize("kind", ["in_process", "shared_memory"])
@pytest.mark.parametrize("arrivals", [NEVER, UNEVEN])
def test_a_capture_that_fails_is_the_fault_of_its_rank_and_frees_the_others(
    ranks: Ranks, checkpoint: Path, kind: str, arrivals: Arrivals
) -> None:
    seen = ranks.run(kind, 3, case, {}, checkpoint, arrivals, NUM_STEPS, True, (1, 3))
    total = seen[1].progress[0][1]
    error = f"CaptureFailed: graph 4 of {total}: RuntimeError: out of memory"
    assert seen[1].error == error
    for other in (seen[0], seen[2]):
        assert other.error == f"CollectiveAborted: aborted by rank 1: {error}"
        assert other.places == seen[1].places


def test_room_for_all_rows_is_made_once_before_the_first_graph() -> None:
    seen = list[str]()

    class Graph:
        count = 2

        def capture_beside_prefill(self) -> Iterator[None]:
            yield from ()

        def capture(self) -> Iterator[None]:
            for _ in range(self.count):
                seen.append("graph")
                yield

    graphs = CapturedGraphs({Pass.TARGET: {1: Graph()}}, {})  # type: ignore[dict-item]
    collective = InProcessGroup(1, 5.0).collective(0)
    pending = PendingCapture(
        graphs, collective, lambda: seen.append("room"), lambda: 0, lambda done, total: None
    )
    assert seen == []
    while pending.use is None:
        pending.advance()
    assert seen == ["room", "graph", "graph"]


def test_an_error_of_cuda_in_a_capture_that_was_aborted_is_the_abort() -> None:
    """A rank that is told to leave its step is well."""
    collective = InProcessGroup(2, 5.0).collective(0)

    class Ended:
        count = 1

        def capture_beside_prefill(self) -> Iterator[None]:
            yield from ()

        def capture(self) -> Iterator[None]:
            collective.abort("the engine ends the epoch")
            raise RuntimeError("operation failed due to a previous error during capture")
            yield

    graphs = CapturedGraphs({Pass.TARGET: {1: Ended()}}, {})  # type: ignore[dict-item]
    pending = PendingCapture(graphs, collective, lambda: None, lambda: 0, lambda done, total: None)
    with pytest.raises(CollectiveAborted, match="the engine ends the epoch"):
        pending.advance()

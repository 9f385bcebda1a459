"""Lists of faults as text: what they say, and how mistakes in them are named."""

from __future__ import annotations

import pytest

from dp_runtime import EngineConfig
from dp_runtime.core.faults import Fault, FaultKind, read_faults
from dp_runtime.runner.fault_injection import DueFaults


def test_a_list_of_faults_is_read() -> None:
    text = "rank=2, step=50, kind=kill; rank=0,step=9,kind=slow,seconds=2.5,epoch=1"
    assert read_faults(text, 3) == (
        Fault(2, 50, FaultKind.KILL),
        Fault(0, 9, FaultKind.SLOW, 1, 2.5),
    )
    text = (
        "rank=1,after_s=1.5,kind=slow,seconds=0.01,until_s=3;"
        "rank=1,step=4,kind=slow,seconds=1,until=6"
    )
    assert read_faults(text, 2) == (
        Fault(1, 0, FaultKind.SLOW, seconds=0.01, after_s=1.5, until_s=3.0),
        Fault(1, 4, FaultKind.SLOW, seconds=1.0, until=6),
    )
    assert EngineConfig("x", dp_size=3, inject=text).faults == read_faults(text, 3)
    assert read_faults(None, 3) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kill", r"^inject: 'kill' is not allowed; faults as rank=2,step=50,kind=kill with kind"),
        ("rank=0,step=1", r"^inject: 'rank=0,step=1' is not allowed; faults as"),
        ("rank=0,step=1,kind=kill;", r"^inject: '' is not allowed"),
        ("rank=0,step=1,kind=kill,rank=1", r"^inject: 'rank=1' is not allowed"),
        ("rank=0,step=1,kind=kill,pass=1", r"^inject: 'pass=1' is not allowed"),
        ("rank=0,step=1,kind=die", r"^inject: kind: 'die' is not allowed; kind is one of kill, "),
        ("rank=2,step=1,kind=kill", r"^inject: rank: '2' is not allowed; an integer of 0..1$"),
        ("rank=0,step=-1,kind=kill", r"^inject: step: '-1' is not allowed; an integer of 0..2147"),
        ("rank=0,step=1,kind=kill,epoch=x", r"^inject: epoch: 'x' is not allowed; an integer"),
        ("rank=0,step=1,kind=slow", r"^inject: seconds: None is not allowed; kind slow needs it"),
        ("rank=0,step=1,kind=nan,seconds=1", r"^inject: seconds: '1' is not allowed; kind slow"),
        ("rank=0,step=1,kind=slow,seconds=nan", r"^inject: seconds: 'nan' is not allowed; a numb"),
        ("rank=0,step=1,kind=slow,seconds=x", r"^inject: seconds: 'x' is not allowed; a number ab"),
        ("rank=0,kind=kill", r"^inject: 'rank=0,kind=kill' is not allowed; faults as"),
        ("rank=0,step=1,after_s=1,kind=kill", r"^inject: 'rank=0,step=1,after_s=1,kind=kill' is"),
        (
            "rank=0,step=1,kind=kill,until=3",
            r"^inject: until: '3' is not allowed; kind slow",
        ),
        ("rank=0,after_s=-1,kind=kill", r"^inject: after_s: '-1' is not allowed; a number above"),
        ("rank=0,after_s=1,kind=mismatch", r"^inject: after_s: '1' is not allowed; step, with"),
        ("", r"^inject: '' is not allowed; None or faults as"),
    ],
)
def test_a_mistake_names_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig("x", dp_size=2, inject=text)


@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_no_fault_of_a_rank_ends_the_process_of_its_user(kind: str) -> None:
    with pytest.raises(ValueError, match=f"inject: kind: '{kind}' is not allowed; launcher ray"):
        EngineConfig("x", launcher="thread", inject=f"rank=0,step=1,kind={kind}")


def test_a_fault_that_lasts_happens_in_each_of_its_steps() -> None:
    text = (
        "rank=0,step=3,kind=slow,seconds=1,until=5;rank=0,after_s=2,kind=slow,seconds=2,until_s=4"
    )
    due = DueFaults(read_faults(f"{text};rank=0,step=4,kind=slow,seconds=3", 1), 0, 0)

    def seconds(step: int, elapsed_s: float) -> list[float]:
        return [one.seconds for one in due.take(step, FaultKind.SLOW, elapsed_s=elapsed_s)]

    assert [seconds(step, step - 2.5) for step in range(9)] == [
        [], [], [], [1], [1, 3], [1, 2], [2], [], [],
    ]  # fmt: skip
    assert not due

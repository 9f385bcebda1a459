"""Lists of faults as text: what they say, and how mistakes in them are named."""

from __future__ import annotations

import pytest

from dp_runtime import EngineConfig
from dp_runtime.core.faults import Fault, FaultKind, read_faults


def test_a_list_of_faults_is_read() -> None:
    text = "rank=2, step=50, kind=kill; rank=0,step=9,kind=slow,seconds=2.5,epoch=1"
    assert read_faults(text, 3) == (
        Fault(2, 50, FaultKind.KILL),
        Fault(0, 9, FaultKind.SLOW, 1, 2.5),
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
        ("", r"^inject: '' is not allowed; None or faults as"),
    ],
)
def test_a_mistake_names_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig("x", dp_size=2, inject=text)


@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_no_fault_of_a_rank_ends_the_process_of_its_user(kind: str) -> None:
    with pytest.raises(ValueError, match=f"inject: kind: '{kind}' is not allowed; with launcher"):
        EngineConfig("x", launcher="thread", inject=f"rank=0,step=1,kind={kind}")

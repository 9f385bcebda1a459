"""Messages are one bounded line, and every caller gets an error of its own."""

from __future__ import annotations

import pickle
import traceback

import pytest

from dp_runtime.errors import (
    MAX_SHOWN,
    MAX_TEXT,
    EngineClosed,
    EngineOverloaded,
    RankFailed,
    RequestFailed,
    StartError,
    fresh,
    one_line,
    require,
    shown,
)
from tests.dp_runtime.hostile import HostileObject, HostileRepr, junk, nested

OURS = (StartError, RankFailed, RequestFailed, EngineClosed)
RAW = "a\nb\r\x1b[31m\x00\u2028\u202e\ud800\x9b"
ESCAPED = "a\\nb\\r\\x1b[31m\\x00\\u2028\\u202e\\ud800\\x9b"


def test_what_does_not_print_is_escaped() -> None:
    assert one_line(RAW) == ESCAPED
    assert one_line("größer → 好") == "größer → 好"
    assert one_line("x" * 50, 10) == "xxxxxxx..."
    assert len(one_line("\n" * 10_000_000)) == MAX_TEXT


@pytest.mark.parametrize("kind", OURS)
def test_our_errors_are_one_line(kind: type[Exception]) -> None:
    error = kind(RAW)
    assert str(error) == ESCAPED
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, ESCAPED)
    assert len(str(kind("x" * 2_700_000))) == MAX_TEXT


def test_an_overload_has_its_numbers() -> None:
    error = EngineOverloaded(8, 8, 3)
    for same in (error, fresh(error), pickle.loads(pickle.dumps(error))):
        assert (same.num_unfinished, same.limit, same.num_waiting) == (8, 8, 3)
        assert str(same) == (
            "8 requests are unfinished, and 8 may be (max_queued_requests), "
            "and 3 callers wait for a place"
        )
    assert str(EngineOverloaded(2, 2)).endswith("(max_queued_requests)")


def test_every_value_can_be_shown() -> None:
    for name, value in junk().items():
        assert shown(value).isprintable(), name
        assert len(shown(value)) <= MAX_SHOWN
    assert shown(HostileObject()) == "<HostileObject>"
    assert shown(nested(100_000)) == "<list>"
    assert shown(10**5000) == "<int>"
    assert shown(HostileRepr()).startswith("a\\n\\x1b[31mb")


def test_a_mistake_is_bounded_in_each_of_its_parts() -> None:
    with pytest.raises(ValueError, match=r"\.\.\.: \[0, 0") as caught:
        require(False, "f\n" * 10_000, [0] * 10_000, "x" * 10_000)
    assert len(str(caught.value)) == MAX_TEXT
    assert str(caught.value).isprintable()


def test_a_fresh_error_has_the_cause_and_no_traceback() -> None:
    cause = OSError("the cause")
    error = RankFailed("rank 1 died")
    error.__cause__ = cause
    frames = []
    for _ in range(50):
        with pytest.raises(RankFailed, match=r"^rank 1 died$") as caught:
            raise fresh(error)
        assert caught.value is not error
        assert caught.value.__cause__ is cause
        frames.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert set(frames) == {1}
    assert error.__traceback__ is None

"""How benchmarks of kernels choose among candidates: stand-ins with known errors and times."""

from __future__ import annotations

import math

import pytest

from examples.benchmarks.kernels.trials import try_all

ERRORS = {"slow": 0.0, "wrong": 0.5, "fast": 0.001, "not a number": math.nan}
TIMES = {"slow": 9.0, "wrong": 1.0, "fast": 3.0, "not a number": 1.0}


def test_what_is_wrong_or_fails_is_named_and_the_fastest_comes_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[bool] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda: waited.append(True))
    found = try_all([*ERRORS, "missing"], ERRORS.__getitem__, TIMES.__getitem__, math.inf)
    assert list(found.items()) == [("fast", 3.0), ("slow", 9.0)]
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == [
        "  WRONG by 0.5: wrong",
        "  WRONG by nan: not a number",
        "  failed: missing: KeyError: 'missing'",
    ]
    assert waited == [True]


def test_a_device_that_is_lost_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr("torch.cuda.synchronize", lost)
    with pytest.raises(RuntimeError, match="the device is lost"):
        try_all(["missing"], ERRORS.__getitem__, TIMES.__getitem__, math.inf)


def test_one_is_tried_however_late_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    found = try_all(range(9), lambda _: 0.0, float, -math.inf)
    assert len(found) == 1
    assert "out of time: 1 of 9 tried" in capsys.readouterr().out

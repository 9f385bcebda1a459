"""What changed between two runs: points are paired, and chance is told from difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from dp_runtime.experiments import write_report
from dp_runtime.experiments.measurement.intervals import Interval
from dp_runtime.experiments.report.comparison import Change, changed_settings, changes
from dp_runtime.experiments.report.source import Source
from tests.dp_runtime.experiments.report.pages import Page
from tests.dp_runtime.experiments.report.runs import write_results

POINTS = [{"engine.padding": "max_len"}, {"engine.padding": "ragged"}]


def interval(mean: float, half: float | None = None) -> Interval:
    if half is None:
        return Interval(mean, None, None, 1)
    return Interval(mean, mean - half, mean + half, 3)


@pytest.mark.parametrize(
    ("figure", "before", "after", "reading"),
    [
        ("output_tok_s", interval(10, 1), interval(20, 1), "better"),
        ("output_tok_s", interval(20, 1), interval(10, 1), "worse"),
        ("ttft_ms_p50", interval(20, 1), interval(10, 1), "better"),
        ("ttft_ms_p50", interval(10, 1), interval(11.5, 1), "may be chance"),
        ("wire_rows", interval(10, 1), interval(20, 1), "other"),
        ("output_tok_s", interval(10), interval(20, 1), "one run each"),
        ("output_tok_s", interval(10, 1), interval(10, 2), "the same"),
    ],
)
def test_readings(figure: str, before: Interval, after: Interval, reading: str) -> None:
    assert Change("point", figure, before, after).reading == reading


def test_points_of_the_same_name_are_paired(tmp_path: Path) -> None:
    slow = write_results(tmp_path / "slow", POINTS, scale=4.0)
    fast = write_results(tmp_path / "fast", [*POINTS[1:], {"engine.padding": "other"}], scale=1.0)
    found = changes(Source.read(fast), Source.read(slow))
    assert {each.point for each in found} == {"padding ragged"}
    ttft = next(each for each in found if each.figure == "ttft_ms_p50")
    assert ttft.relative == pytest.approx(1 / 8 - 1), "the second point of four times the time"
    assert changed_settings(Source.read(fast), Source.read(slow)) == [("engine.seed", 4.0, 1.0)]
    target = write_report(fast, tmp_path / "page.html", against=slow)
    page = Page(target.read_text(encoding="utf-8"))
    written = {each["figure"]: each for each in page.data["changes"]}
    assert written["ttft_ms_p50"]["before"] == ttft.before.mean
    assert written["ttft_ms_p50"]["reading"] == "better"
    assert "What changed against slow" in page.root.text


def test_single_runs_are_compared_whatever_their_names(tmp_path: Path) -> None:
    grid = write_results(tmp_path / "grid", POINTS)
    one, other = (Source.read(grid / "runs" / f"key{number}-0") for number in (0, 1))
    assert {each.reading for each in changes(one, other)} <= {"one run each", "the same"}
    assert changed_settings(one, other) == [("engine.padding", "ragged", "max_len")]


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    one = write_results(tmp_path / "one", POINTS, repeats=1)
    other = write_results(tmp_path / "other", [{"case": "a"}, {"case": "b"}], repeats=1)
    with pytest.raises(ValueError, match=r"against: 'a, b' is not allowed; .* padding max_len"):
        write_report(one, against=other)

"""Axes hold what they show, with few and round numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.experiments.report.charts.markup import Html, joined, tag
from dp_runtime.experiments.report.charts.scale import Scale, short, top

VALUES = st.lists(
    st.floats(-1e9, 1e9).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=1, max_size=6
)


@settings(max_examples=30, deadline=None)
@given(values=VALUES)
def test_all_values_are_on_the_axis_and_ticks_are_few(values: list[float]) -> None:
    scale = Scale.around(values)
    assert all(0 <= scale.percent(value) <= 100 for value in values)
    assert 1 <= len(scale.ticks()) <= 5
    assert top(max(values)) >= max(values)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3.0, "3"), (12345.0, "12,345"), (0.12345, "0.123"), (1234.56, "1,235"),
     (2.5e9, "2.5e+09"), (float("nan"), "none")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_ends_of_axes_are_round() -> None:
    assert [top(value) for value in (0.0, 0.9, 7.0, 133.0)] == [1.0, 1.0, 8.0, 150.0]


def test_texts_are_escaped_once() -> None:
    inner = tag("b", "<i>", title='"')
    assert inner == '<b title="&quot;">&lt;i&gt;</b>'
    assert tag("p", inner, "&") == f"<p>{inner}&amp;</p>"
    assert joined(Html("<br>"), "<") == "<br>&lt;"

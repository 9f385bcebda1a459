"""Bins sum up the steps that are in them, and long steps fill the bins that they last through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.experiments.report.bins import Bins

TIMES = st.lists(st.floats(0, 1e3), min_size=1, max_size=40)


def test_means_are_weighted_and_nan_is_no_value() -> None:
    at_s, duration_s = np.array([0.0, 1.0, 2.0, 3.0]), np.ones(4)
    bins = Bins.over(at_s, duration_s, most=2)
    band = bins.band(np.array([1.0, 3.0, np.nan, 8.0]), weights=np.array([1.0, 3.0, 9.0, 1.0]))
    assert band.low.tolist() == [1, 8]
    assert band.mean.tolist() == [2.5, 8]
    assert band.high.tolist() == [3, 8]
    assert bins.band(np.full(4, np.nan)).lists()["mean"] == [None, None]


def test_a_long_step_lasts_and_an_idle_time_is_a_gap() -> None:
    at_s, duration_s = np.array([0.0, 0.5, 9.0, 9.5]), np.array([0.5, 4.0, 0.5, 0.5])
    mean = Bins.over(at_s, duration_s, most=4).band(np.arange(4.0)).mean
    assert mean[:2].tolist() == [0.5, 1.0]
    assert np.isnan(mean[2])
    assert mean[3] == 2.5


@settings(max_examples=50, deadline=None)
@given(times=TIMES, most=st.integers(1, 20))
def test_every_step_is_in_a_bin(times: list[float], most: int) -> None:
    at_s = np.sort(np.array(times)) - min(times)
    bins = Bins.over(at_s, np.zeros(len(at_s)), most)
    values = np.arange(len(at_s), dtype=np.float64)
    band = bins.band(values)
    assert set(bins.step.tolist()) == set(range(len(at_s)))
    assert np.nanmax(band.high) == values.max()
    assert np.nanmin(band.low) == 0
    known = ~np.isnan(band.mean)
    assert (band.low[known] <= band.mean[known] + 1e-9).all()
    assert (band.mean[known] <= band.high[known] + 1e-9).all()
    assert bins.count == pytest.approx(min(most, len(at_s)))

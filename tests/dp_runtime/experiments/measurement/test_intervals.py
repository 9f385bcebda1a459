"""Confidence intervals and noise, against known figures."""

from __future__ import annotations

from math import gamma, pi, sqrt
from statistics import stdev

import numpy as np
import pytest

from dp_runtime.experiments.measurement.intervals import T_975, Interval, noise_floor


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 30])
def test_the_table_is_student_s_t(freedom: int) -> None:
    x = np.linspace(0, T_975[freedom - 1], 20_001)
    scale = gamma((freedom + 1) / 2) / (sqrt(freedom * pi) * gamma(freedom / 2))
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.475, abs=2e-5)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(2000):
        interval = Interval.of(rng.normal(10, 3, 3).tolist())
        assert interval.low is not None
        assert interval.high is not None
        held += interval.low <= 10 <= interval.high
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


def test_one_value_has_no_interval() -> None:
    assert Interval.of([4.0]) == Interval(4.0, None, None, 1)


def test_noise_is_the_spread_between_repeats_and_not_between_points() -> None:
    assert noise_floor([[10.0, 10.0], [99.0, 99.0]]) == 0
    assert noise_floor([[10.0, 12.0]]) == pytest.approx(stdev([10, 12]) / 11)
    assert noise_floor([[10.0], [12.0]]) is None

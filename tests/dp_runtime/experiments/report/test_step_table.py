"""Steps as arrays have the rows, waits and shares that their traces have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dp_runtime.experiments.measurement.figures import report_of
from dp_runtime.experiments.report.step_table import StepTable
from tests.dp_runtime.experiments.report.runs import make_steps


def test_shares_are_those_of_the_reports_of_engines() -> None:
    steps = make_steps(50, dp_size=3)
    table, report = StepTable.of(steps), report_of(steps)
    (waste, gathered), (balance, room) = table.waste(), table.balance()
    assert np.average(waste, weights=gathered) == pytest.approx(report.padding_waste)
    assert np.average(balance, weights=room) == pytest.approx(report.row_balance)
    assert np.nansum(table.wait_s, axis=0) == pytest.approx(report.wait_s)


def test_the_rank_that_waited_least_was_waited_for() -> None:
    steps = make_steps(2, dp_size=3)
    waits = {(0, 0): 0.1, (0, 1): 0.5, (0, 2): 0.3, (1, 0): 0.2, (1, 1): 0.0, (1, 2): 0.4}
    steps = [
        replace(
            step,
            agree_wait_s=waits[step.step_id, step.dp_rank],
            passes=(replace(step.passes[0], wait_s=0.0),),
        )
        for step in steps
    ]
    found = StepTable.of(steps).waited_for()
    assert found.tolist() == [[0, pytest.approx(0.2), 0], [0.5, 0, 0], [0.3, 0.4, 0]]


def test_epochs_and_lost_ranks() -> None:
    before = [replace(step, start_s=step.start_s) for step in make_steps(3)]
    after = [
        replace(step, epoch=1, start_s=step.start_s + 10, position=0)
        for step in make_steps(2)
        if step.dp_rank == 1
    ]
    table = StepTable.of(before + after)
    assert table.real.shape == (5, 2)
    assert np.isnan(table.real[3:, 0]).all()
    assert (np.diff(table.at_s) > 0).all()
    assert table.real[3, 1] == after[0].passes[0].real_rows[0], "its position, not its rank"
    assert StepTable.of(after).waited_for().tolist() == [[0.0]]

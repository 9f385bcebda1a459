"""What is asked of an engine as one of its ranks is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dp_runtime.errors import RankFailed
from tests.workers.engines import SHORT, engine
from tests.workers.leftovers import wait_until
from tests.workers.test_worker_group import HUNG, group_of
from workers.messages import Rendezvous
from workers.supervision import reach


def test_a_loss_that_is_recovered_fails_no_question(model: Path) -> None:
    """A report waits for the rank's successor; the others tell of their steps at once."""
    with engine(model, "local", max_recoveries=5) as running:
        running.generate([[1, 2, 3]] * 4, SHORT)
        os.kill(running.health()[1].pid, signal.SIGKILL)
        report = running.report()
        assert {step.dp_rank for step in running.step_trace()} >= {0}
        assert [rank.totals.dp_rank for rank in running.metrics()] == [0, 1]
        assert report.requests == 4
        assert report.output_tokens_by_rank[0] > 0
        wait_until(lambda: {rank.epoch for rank in running.health()} == {1}, "recovered", 90)
        assert len(running.generate([[1, 2, 3]] * 4, SHORT)) == 4
        assert running.report().requests == 8


def test_a_loss_for_good_is_what_a_question_hears_of(model: Path) -> None:
    with engine(model, "local") as running:
        os.kill(running.health()[1].pid, signal.SIGKILL)
        with pytest.raises(RankFailed, match="rank 1"):
            running.report()


def test_a_rank_that_never_answers_is_asked_until_a_start_would_be_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reach, "STATUS_S", 0.02)
    met = Rendezvous("torch_distributed", "tcp://10.0.0.0:5000", "secret")
    group, ranks = group_of({"openrendezvous": met}, {"readtotals": HUNG}, start_timeout_s=1.0)
    group.start(False, 5.0)
    with pytest.raises(RankFailed, match=r"ranks \[1\] did not finish 'readtotals' in time"):
        group.totals()
    assert ranks[1].calls.count("readtotals") > 1
    group.close()

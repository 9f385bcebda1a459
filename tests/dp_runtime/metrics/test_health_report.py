"""What a server tells of the health of ranks."""

import json

import pytest

from dp_runtime.metrics.health_report import HealthReport
from dp_runtime.metrics.status import RankHealth, RankState

SERVING = {RankState.RUNNING, RankState.IDLE, RankState.CAPTURING}


@pytest.mark.parametrize("state", RankState)
def test_an_engine_can_serve_if_every_rank_can(state: RankState) -> None:
    report = HealthReport.of([RankHealth(0, RankState.RUNNING), RankHealth(1, state)])
    assert report.can_serve == (state in SERVING)


def test_no_ranks_can_not_serve() -> None:
    assert not HealthReport.of([]).can_serve


def test_the_report_survives_json() -> None:
    ranks = [
        RankHealth(
            0,
            RankState.IDLE,
            pid=7,
            host="a",
            last_step=12,
            last_step_age_s=0.12345,
            graphs_captured=3,
            graphs_total=4,
        ),
        RankHealth(1, RankState.FAILED, error='rank 1: "x"\n'),
    ]
    first, second = json.loads(json.dumps(HealthReport.of(ranks).ranks))
    assert (first["state"], first["last_step"], first["last_step_age_s"]) == ("idle", 12, 0.123)
    assert (first["graphs_captured"], first["graphs_total"]) == (3, 4)
    assert (first["pid"], second["pid"]) == (7, None), "0 is the whole job of who signals to it"
    assert (second["dp_rank"], second["state"], second["error"]) == (1, "failed", 'rank 1: "x"\n')

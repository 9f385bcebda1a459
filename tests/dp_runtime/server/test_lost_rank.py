"""An engine that has failed: everyone is told why, and the server goes on telling it."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from dp_runtime.core.membership import Membership
from dp_runtime.metrics.status import RankHealth, RankState
from tests.dp_runtime.server.served import WAIT_S, serving
from tests.signals import stop

ENDLESS = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The runtime's log, which an earlier test may have sent to stderr alone."""
    logging.getLogger("dp_runtime").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("dp_runtime").removeHandler(caplog.handler)


def told(client: httpx.Client) -> dict[str, tuple[int, str]]:
    answers = {path: client.get(path) for path in ("/health", "/ready")}
    return {path: (one.status_code, one.json()["status"]) for path, one in answers.items()}


def test_all_hear_of_a_rank_that_is_killed(log: pytest.LogCaptureFixture) -> None:
    with serving(launcher="local", max_recoveries=0) as served, served.client() as client:
        whole = []
        thread = threading.Thread(
            target=lambda: whole.append(served.post("/v1/completions", **ENDLESS, dp_rank=0))
        )
        thread.start()
        body = ENDLESS | {"stream": True, "dp_rank": 1}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            while len(served.state.jobs) < 2:
                pass
            os.kill(client.get("/health").json()["ranks"][1]["pid"], signal.SIGKILL)
            *_, error, _, done, _ = lines
        assert done == "data: [DONE]"
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_failed"
        thread.join(WAIT_S)
        assert (whole[0].status_code, whole[0].headers["retry-after"]) == (503, "1")
        assert "rank 1" in whole[0].json()["error"]["message"]
        assert told(client) == {"/health": (503, "failed"), "/ready": (503, "failed")}
        health = client.get("/health")
        assert "SIGKILL" in health.json()["ranks"][1]["error"]
        refused = client.post("/v1/completions", json=ENDLESS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_failed")
        assert client.get("/v1/models").status_code == 200
        assert not len(served.state.jobs)
    assert "the engine has failed" in log.text
    assert "Traceback" not in log.text


def test_a_client_whose_rank_is_missing_is_told_to_come_again() -> None:
    with serving() as served:
        served.engine._core._group._supervisor.changes.wanted = Membership.first(3)  # type: ignore[attr-defined]
        refused = served.post("/v1/completions", prompt="a", dp_rank=2)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("rank_missing", "dp_rank")
        assert error["message"] == "dp_rank: rank 2 was lost; ranks 0..1 serve until it is back"
        assert served.post("/v1/completions", prompt="a", dp_rank=3).status_code == 400
        assert served.post("/v1/completions", prompt="a", dp_rank=1).status_code == 200


def test_an_engine_whose_ranks_meet_anew_is_paused_and_not_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving() as served, served.client() as client:
        group = served.engine._core._group
        between = tuple(replace(rank, state=RankState.READY) for rank in group.health(5.0))
        waits: list[float] = []

        def health(timeout_s: float) -> tuple[RankHealth, ...]:
            waits.append(timeout_s)
            return between

        monkeypatch.setattr(group, "health", health)
        assert told(client) == {"/health": (200, "paused"), "/ready": (503, "paused")}
        assert max(waits) < 1.0, "as long as a probe of Kubernetes waits"
        monkeypatch.undo()
        assert told(client) == {"/health": (200, "ok"), "/ready": (200, "ok")}


def test_a_server_lives_although_a_rank_does_not_answer() -> None:
    with serving(launcher="local", hang_timeout_s=3600.0) as served, served.client() as client:
        pid = client.get("/health").json()["ranks"][1]["pid"]
        stop(pid)
        try:
            assert told(client) == {"/health": (200, "paused"), "/ready": (503, "paused")}
        finally:
            os.kill(pid, signal.SIGCONT)

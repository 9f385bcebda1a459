"""What a server tells those who watch it: /health and /metrics."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from dp_runtime import EngineConfig
from dp_runtime.cli.main import main
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.flight.dump_file import read_dump
from dp_runtime.metrics.recording import Recording
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.http.listener import Listener
from dp_runtime.server.state import ServerState
from tests.dp_runtime.server.served import MODEL, Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving({"api_key": "secret"}) as running:
        yield running


def test_scrapers_need_no_key_and_see_what_was_served(served: Served) -> None:
    key = {"Authorization": "Bearer secret"}
    with served.client() as client:
        body = {"prompt": [[1, 2], [3], [4, 5]], "max_tokens": 4, "ignore_eos": True}
        usage = client.post("/v1/completions", json=body, headers=key).json()["usage"]
        answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    page = {family.name: family.samples for family in parse(answer.text)}
    generated = page["vllm:generation_tokens"]
    assert sum(sample.value for sample in generated) == usage["completion_tokens"] == 12
    assert {sample.labels["model_name"] for sample in generated} == {MODEL}


def test_health_tells_of_every_rank(served: Served) -> None:
    with served.client() as client:
        answer = client.get("/health")
    assert answer.status_code == 200
    health = answer.json()
    assert health["status"] == "ok"
    assert [rank["dp_rank"] for rank in health["ranks"]] == [0, 1]
    assert health["standbys"] == 0
    for rank in health["ranks"]:
        assert rank["state"] in ("running", "idle")
        assert rank["last_step_age_s"] >= 0


def test_warm_standbys_are_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = served.engine._core._group
    monkeypatch.setattr(type(group.standbys), "num_warm", 3)
    with served.client() as client:
        assert client.get("/health").json()["standbys"] == 3
        page = {family.name: family.samples for family in parse(client.get("/metrics").text)}
    (sample,) = page["dp_runtime_standbys_warm"]
    assert (sample.labels, sample.value) == ({}, 3.0)


def test_a_flight_record_is_for_those_with_a_key_and_for_the_doctor(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served.client() as client:
        assert client.get("/flight_record").status_code == 401
        answer = client.get("/flight_record", headers={"Authorization": "Bearer secret"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    path = tmp_path / "flight.jsonl"
    path.write_bytes(answer.content)
    assert [rank.dp_rank for rank in read_dump(path).ranks] == [0, 1]
    assert main(["doctor", str(path)]) == 0
    assert "Flight record of 2 ranks" in capsys.readouterr().out


def test_a_recording_is_for_those_with_a_key_and_for_replay(served: Served, tmp_path: Path) -> None:
    prompt = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    with served.client() as client:
        assert client.get("/recording").status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert client.post("/v1/completions", json=prompt, headers=key).status_code == 200
        answer = client.get("/recording", headers=key)
    (tmp_path / "run.rec").write_bytes(answer.content)
    recording = Recording.read(tmp_path / "run.rec")
    assert recording.config["dp_size"] == 2
    assert [end.output_tokens for step in recording.steps for end in step.ended][-1] == 4


def test_a_server_that_loads_has_no_metrics_yet() -> None:
    state = ServerState(ServerConfig(port=0), EngineConfig(str(TINY_MODEL)))
    listener = Listener(state)
    try:
        served = Served(listener.url, state, None, listener)  # type: ignore[arg-type]
        with served.client() as client:
            for path in ("/metrics", "/health", "/flight_record", "/recording"):
                assert client.get(path).status_code == 503
    finally:
        listener.close(threading.Event())

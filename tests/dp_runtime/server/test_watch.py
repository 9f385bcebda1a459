"""What a server tells those who watch it: /health and /metrics."""

import threading
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from dp_runtime import EngineConfig
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.listener import Listener
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
    for rank in health["ranks"]:
        assert rank["state"] in ("running", "idle")
        assert rank["last_step_age_s"] >= 0


def test_a_server_that_loads_has_no_metrics_yet() -> None:
    state = ServerState(ServerConfig(port=0), EngineConfig(str(TINY_MODEL)))
    listener = Listener(state)
    try:
        served = Served(listener.url, state, None, listener)  # type: ignore[arg-type]
        with served.client() as client:
            for path in ("/metrics", "/health"):
                assert client.get(path).status_code == 503
    finally:
        listener.close(threading.Event())

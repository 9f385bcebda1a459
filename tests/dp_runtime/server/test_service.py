"""What surrounds generation: health, keys, limits, aborts, clients that leave."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from time import sleep

import httpx
import pytest

from dp_runtime.server.config import ServerConfig
from dp_runtime.server.errors import FAULT
from tests.dp_runtime.server.served import MODEL, Served, serving
from tests.dp_runtime.server.unharmed import logged

ENDLESS = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    limits = {"api_key": "secret", "max_in_flight": 3, "max_body_bytes": 20_000}
    with serving(limits, max_queued_requests=3) as running:
        yield running


@pytest.fixture
def key() -> dict[str, str]:
    return {"Authorization": "Bearer secret"}


@pytest.mark.parametrize("given", [None, "Bearer secreT", "secret", "Bearer", "Bearer é"])
def test_a_key_is_asked_for(served: Served, given: str | None) -> None:
    headers = {} if given is None else {b"Authorization": given.encode()}
    with served.client() as client:
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200


def test_a_scheme_has_no_case(served: Served) -> None:
    with served.client(headers={"Authorization": "bearer secret"}) as client:
        assert client.get("/v1/models").status_code == 200


def test_a_key_is_not_shown() -> None:
    assert "sesame" not in repr(ServerConfig(api_key="sesame"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_of_ours_is_told_without_its_details(
    served: Served, key: dict[str, str], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("of mine")

    told = {"message": FAULT, "type": "server_error", "param": None, "code": None}
    with served.client(headers=key) as client, logged() as records:
        monkeypatch.setattr(served.state, "encoded", fail)
        body = {"prompt": "a", "max_tokens": 1, "stream": stream}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == (200 if stream else 500)
        if stream:
            event, _, end = answer.text.partition("\n\n")
            assert end == "data: [DONE]\n\n"
            assert json.loads(event.removeprefix("data: ")) == {"error": told}
        monkeypatch.setattr(served.state, "check_model", fail)
        answer = client.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()) == (500, {"error": told})
    assert [record.levelname for record in records] == ["ERROR", "ERROR"]
    assert all(record.exc_info for record in records)  # the log has the details
    served.check_idle()


def test_the_model_and_its_tokens(served: Served, key: dict[str, str]) -> None:
    with served.client(headers=key) as client:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == [MODEL]
        assert client.get("/v1/models/other").status_code == 404
        tokens = client.post("/tokenize", json={"prompt": "Return a new string"}).json()
        assert tokens["count"] == len(tokens["tokens"])
        text = client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
        assert text == {"prompt": "Return a new string"}


def test_clients_need_no_tokenizer(served: Served, key: dict[str, str]) -> None:
    with served.client(headers=key) as client:
        info = client.get("/tokenizer_info").json()
        ends = client.post("/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"]
    assert ends == list(served.engine.model.eos_token_ids)
    assert info["chat_template"] == served.engine.model.chat.templates["default"]


def test_large_bodies_are_refused(served: Served, key: dict[str, str]) -> None:
    with served.client(headers=key) as client:
        answer = client.post("/v1/completions", content=b"x" * 20_001)
        assert answer.status_code == 413
        unannounced = client.post("/v1/completions", content=iter([b"x" * 10_001] * 2))
        assert unannounced.status_code == 413


def test_more_than_may_be_in_flight_get_429(served: Served, key: dict[str, str]) -> None:
    with served.client(headers=key) as client:
        streams = [
            client.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True})
            for _ in range(3)
        ]
        for stream in streams:
            stream.__enter__()
        answer = client.get("/v1/models")
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        for stream in streams:
            stream.__exit__(None, None, None)
    served.check_idle()


def test_a_full_queue_is_told_before_the_body_is_read(served: Served, key: dict[str, str]) -> None:
    body = ENDLESS | {"stream": True, "n": 3}
    with served.client(headers=key) as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            refused = client.post("/v1/completions", content=b"[")
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "engine_overloaded"
            assert refused.headers["retry-after"] == "1"
        served.check_idle()
        too_many = client.post("/v1/completions", json=ENDLESS | {"n": 4})
        assert too_many.json()["error"]["code"] == "engine_overloaded"
    served.check_idle()


def test_a_request_without_a_token_in_time_is_a_408(served: Served, key: dict[str, str]) -> None:
    body = {"prompt": ["a", "b"], "timeout_s": 1e-6}
    chat = {"messages": [{"role": "user", "content": "a"}], "timeout_s": 1e-6}
    with served.client(headers=key) as client:
        for path, one in (("completions", body), ("chat/completions", chat)):
            answer = client.post(f"/v1/{path}", json=one)
            assert answer.status_code == 408
            assert answer.headers["x-should-retry"] == "false"
            assert answer.json()["error"] == {
                "message": "no token came within 1e-06 s (timeout_s)", "type": "timeout_error",
                "param": "timeout_s", "code": "request_timeout",
            }  # fmt: skip
            lines = client.post(f"/v1/{path}", json=one | {"stream": True}).text.split("\n\n")
            assert lines[-2:] == ["data: [DONE]", ""]
            last = json.loads(lines[-3].removeprefix("data: "))
            assert last["choices"][0]["finish_reason"] == "timeout"
        assert client.post("/v1/completions", json=body | {"timeout_s": 0}).status_code == 400
    served.check_idle()


def test_a_late_request_has_what_came_in_time(served: Served, key: dict[str, str]) -> None:
    body = ENDLESS | {"timeout_s": 0.5, "return_token_ids": True}
    with served.client(headers=key) as client:
        answer = client.post("/v1/completions", json=body).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "timeout"
    assert 0 < len(choice["token_ids"]) == answer["usage"]["completion_tokens"] < 1900
    served.check_idle()


def test_a_client_that_leaves_takes_its_request_along(served: Served, key: dict[str, str]) -> None:
    with served.client(headers=key) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=ENDLESS, timeout=0.1)
        served.check_idle()
        body = ENDLESS | {"stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    served.check_idle()


def test_a_request_is_aborted_by_its_id(served: Served, key: dict[str, str]) -> None:
    answers = []

    def ask() -> None:
        with served.client(headers=key) as client:
            answers.append(client.post("/v1/completions", json=ENDLESS | {"request_id": "mine"}))

    thread = threading.Thread(target=ask)
    thread.start()
    while not len(served.state.jobs):
        sleep(0.01)
    with served.client(headers=key) as client:
        done = client.post("/v1/abort", json={"request_ids": ["cmpl-mine", "cmpl-other"]})
    assert done.json() == {"aborted": ["cmpl-mine"]}
    thread.join(30)
    assert answers[0].json()["choices"][0]["finish_reason"] == "abort"
    served.check_idle()


def test_without_an_engine_the_answer_is_503(served: Served, key: dict[str, str]) -> None:
    served.state.draining = True
    try:
        with served.client(headers=key) as client:
            answer = client.post("/v1/completions", json={"prompt": "a"})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert client.get("/health").status_code == 503
    finally:
        served.state.draining = False

"""Ranks that are changed over HTTP, by those who bring the key for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from dp_runtime.server.config import ServerConfig
from tests.dp_runtime.server.served import Served, serving

BODY = {"prompt": [5, 6, 7], "max_tokens": 150, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving({"admin_key": "root"}, dp_size=2) as running:
        yield running


def call(served: Served, path: str, key: str = "root", **body: Any) -> httpx.Response:
    with served.client(headers={"Authorization": f"Bearer {key}"}) as client:
        return client.post(path, json=body)


def test_streams_go_on_while_ranks_come_and_go(served: Served) -> None:
    def text(_: int) -> str:
        with (
            served.client() as client,
            client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer,
        ):
            return "".join(line for line in answer.iter_lines() if '"error"' in line)

    whole = served.post("/v1/completions", **BODY).json()["choices"][0]["text"]
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(text, number) for number in range(8)]
        choices = [pool.submit(served.post, "/v1/completions", **BODY) for _ in range(4)]
        assert call(served, "/admin/drain", dp_rank=0).json() == {"dp_ranks": [1]}
        ranks = served.client().get("/health").json()["ranks"]
        assert [(rank["dp_rank"], rank["dp_size"]) for rank in ranks] == [(1, 1)]
        assert call(served, "/admin/resize", dp_size=2).json() == {"dp_ranks": [0, 1]}
    assert [stream.result() for stream in streams] == [""] * 8
    assert {one.result().json()["choices"][0]["text"] for one in choices} == {whole}
    assert b"dp_runtime_dp_size" in served.client().get("/metrics").content
    served.check_idle()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/admin/resize", {"dp_size": 0}, "dp_size"),
        ("/admin/resize", {"dp_size": "2"}, "dp_size"),
        ("/admin/resize", {}, "dp_size"),
        ("/admin/resize", {"dp_size": 2, "dp_rank": 1}, "dp_rank"),
        ("/admin/drain", {"dp_rank": 7}, "dp_rank"),
        ("/admin/drain", {"dp_rank": 1, "timeout_s": -1}, "timeout_s"),
    ],
)
def test_mistakes_are_named(served: Served, path: str, body: Any, param: str) -> None:
    answer = call(served, path, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_key_is_its_own(served: Served) -> None:
    for key in ("other", "Root"):
        answer = call(served, "/admin/resize", key, dp_size=1)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    with serving({"api_key": "secret"}, dp_size=1) as other:
        answer = call(other, "/admin/resize", "secret", dp_size=1)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_disabled")
    assert "root" not in repr(ServerConfig(admin_key="root"))


def test_no_room_is_a_conflict(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("workers.local_group.LocalLauncher.make_room", refuse)
    answer = call(served, "/admin/resize", dp_size=3)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "resize_failed")
    assert "no room; ranks 0..1 serve on" in answer.json()["error"]["message"]

"""Mutated requests: each is served or refused, and nobody else notices."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from schemathesis.generation import GenerationMode

from dp_runtime.server.app import make_app
from tests.dp_runtime.server.mutants import mutants
from tests.dp_runtime.server.served import WAIT_S, Served, serving
from tests.dp_runtime.server.unharmed import unharmed

REFUSALS = {400, 403, 404, 405, 408, 413, 429}
QUIET: Any = {
    "phases": [Phase.generate], "database": None, "deadline": None,
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(dp_size=1) as running, unharmed(running):
        yield running


def check(answer: httpx.Response) -> int:
    """Assert that this is an answer, or an error in OpenAI's format."""
    if answer.status_code != 200:
        assert answer.status_code in REFUSALS, answer.text
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    elif answer.headers["content-type"].startswith("text/event-stream"):
        *events, last, end = answer.text.split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events)
    elif answer.headers["content-type"] == "application/json":
        answer.json()
    return answer.status_code


def send_mutants(served: Served, seed: int, count: int) -> Counter[int]:
    statuses: Counter[int] = Counter()
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=served.url, timeout=WAIT_S, headers=headers) as client:
        for index, mutant in enumerate(mutants(seed, count)):
            if index % 10 == 9:  # and leave in the middle of an answer
                with client.stream("POST", mutant.path, content=mutant.body) as answer:
                    next(answer.iter_raw(1), None)
            else:
                statuses[check(client.post(mutant.path, content=mutant.body))] += 1
    return statuses


def send_drawn(served: Served, seed: int, count: int) -> None:
    """Send `count` requests to each endpoint, drawn from our schema; an odd seed breaks it."""
    schema = schemathesis.openapi.from_dict(make_app(served.state).openapi())
    with httpx.Client(base_url=served.url, timeout=WAIT_S) as client:

        def send(case: Any) -> None:
            request = case.as_transport_kwargs(base_url=served.url)
            request["content"] = request.pop("data", None)
            known = ("method", "url", "headers", "params", "json", "content")
            check(client.request(**{name: request.get(name) for name in known}))

        operations: Any = schema.get_all_operations()
        for operation in operations:
            wrong = operation.ok().body and seed % 2
            mode = GenerationMode.NEGATIVE if wrong else GenerationMode.POSITIVE
            cases = operation.ok().as_strategy(generation_mode=mode)
            seeded(seed)(settings(max_examples=count, **QUIET)(given(cases)(send)))()


def test_mutants_are_served_or_refused(served: Served) -> None:
    statuses = send_mutants(served, 1, 120)
    assert statuses[200] > 10
    assert statuses[400] > 40


def test_requests_drawn_from_our_schema_are_served_or_refused(served: Served) -> None:
    send_drawn(served, 1, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_5000_requests(served: Served, seed: int) -> None:
    send_mutants(served, 100 + seed, 350)
    send_drawn(served, 100 + seed, 25)

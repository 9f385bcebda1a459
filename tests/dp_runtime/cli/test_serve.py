"""`serve`, as far as it comes without a model."""

from __future__ import annotations

from typing import Any

import pytest

from dp_runtime.cli.main import main
from dp_runtime.cli.serve import KEY_VARIABLES
from dp_runtime.errors import RankFailed
from dp_runtime.server.config import ServerConfig


@pytest.mark.parametrize("key", ["api_key", "admin_key"])
def test_an_empty_key_is_no_open_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLES[key], "")
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {key}: '' is not allowed")


def test_a_server_without_a_trace_ends_well_as_a_rank_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Recovering:
        async def step_trace(self) -> None:
            raise RankFailed("the process of rank 1 ended (SIGKILL)")

    def drained(config: Any, server: Any, on_drained: Any) -> None:
        on_drained(Recovering())

    monkeypatch.setattr("dp_runtime.server.run.serve", drained)
    assert main(["serve"]) == 0


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--model tiny_hybrid", "tiny_hybrid"),
        ("--model tiny_hybrid --served-model-name mine", "mine"),
        ("--model ./tiny_hybrid", None),
        ("", None),
    ],
)
def test_the_model_of_an_example_is_served_by_its_name(
    monkeypatch: pytest.MonkeyPatch, flags: str, name: str | None
) -> None:
    served = list[str | None]()

    def run(config: Any, server: ServerConfig, on_drained: Any) -> None:
        served.append(server.served_model_name)

    monkeypatch.setattr("dp_runtime.server.run.serve", run)
    assert main(["serve", *flags.split()]) == 0
    assert served == [name]

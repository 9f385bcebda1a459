"""`serve`, as far as it comes without a model."""

from __future__ import annotations

import pytest

from dp_runtime.cli.main import main
from dp_runtime.cli.serve import KEY_VARIABLE


def test_an_empty_key_is_no_open_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.startswith("error: api_key: '' is not allowed")

"""`serve`, as far as it comes without a model."""

from __future__ import annotations

import pytest

from dp_runtime.cli.main import main
from dp_runtime.cli.serve import KEY_VARIABLES


@pytest.mark.parametrize("key", ["api_key", "admin_key"])
def test_an_empty_key_is_no_open_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLES[key], "")
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {key}: '' is not allowed")

"""`report` writes a page of a trace that a command has left, or says in one line why it can not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dp_runtime.cli.main import main
from tests.dp_runtime.experiments.report.pages import Page
from tests.dp_runtime.experiments.report.runs import write_results


def test_results_and_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("before", "after"):
        write_results(tmp_path / name, [{}])
    target = tmp_path / "page.html"
    flags = ["--against", str(tmp_path / "before"), "--output", str(target)]
    assert main(["report", str(tmp_path / "after"), *flags]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert "What changed against before" in Page(target.read_text(encoding="utf-8")).root.text


def test_a_path_that_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: report: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["report", "replay"])
def test_what_is_read_is_not_written(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.write_text("steps")
    assert main([command, str(source), "--output", str(source)]) == 2
    assert f"output: {str(source)!r} is not allowed; a file other than" in capsys.readouterr().err
    assert source.read_text() == "steps"

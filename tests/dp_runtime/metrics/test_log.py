"""The log: silent in a user's program but for warnings, shown by our own processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from dp_runtime.cli.main import main
from dp_runtime.metrics.log import LOGGERS, log_to_stderr
from tests.checkpoints import tiny_checkpoint


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def test_lines_of_a_rank_begin_with_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr("info", 3)
    log_to_stderr("info", 3)  # once more adds no second handler
    for name in LOGGERS:
        logging.getLogger(f"{name}.part").info("chose %s", "this")
        logging.getLogger(f"{name}.part").debug("never shown")
    assert capsys.readouterr().err.splitlines() == [
        f"rank 3 INFO {name}.part: chose this" for name in LOGGERS
    ]


def test_the_command_line_shows_what_was_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_checkpoint(tmp_path)), "--max-model-len", "64"]
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt_token_ids": [1, 2], "max_tokens": 2}\n')
    run = ["generate", "--launcher", "thread", "--prompts", str(prompts), *model]
    assert main([*run, "--log-level", "info"]) == 0
    shown = capsys.readouterr().err
    assert "INFO dp_runtime.engine.core: Qwen3MoeForCausalLM on 1 ranks (thread)" in shown
    assert main(run) == 0
    assert "INFO" not in capsys.readouterr().err

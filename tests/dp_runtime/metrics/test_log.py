"""The log: silent in a user's program but for warnings, shown by our own processes."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dp_runtime.cli.main import main
from dp_runtime.metrics.log import LOGGERS, log_to_stderr
from tests.checkpoints import tiny_checkpoint

ROOT = Path(__file__).parents[3]


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


def test_a_user_s_program_sees_warnings_only_and_its_logging_is_left_alone() -> None:
    code = """
import logging
import dp_runtime
for name in ("dp_runtime", "workers", "collectives"):
    logging.getLogger(name + ".part").info("silent")
    logging.getLogger(name + ".part").warning("seen")
    assert not logging.getLogger(name).handlers
assert not logging.getLogger().handlers
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert run.stderr == "seen\n" * 3


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


def test_ranks_inherit_the_level_and_name_themselves(tmp_path: Path) -> None:
    model = ["--model", str(tiny_checkpoint(tmp_path)), "--max-model-len", "64"]
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt_token_ids": [1, 2], "max_tokens": 2}\n')
    run = subprocess.run(
        [sys.executable, "launch.py", "generate", "--launcher", "local", "--device", "cpu",
         "--dp-size", "2", "--log-level", "info", "--prompts", str(prompts), *model],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "rank 0 INFO dp_runtime.startup.build_rank: attention backend torch_ref" in run.stderr
    assert "\nrank 1 INFO dp_runtime." in "\n" + run.stderr
    assert "INFO" not in run.stdout

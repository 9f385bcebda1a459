"""What a rank says of its choices at start."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from dp_runtime import EngineConfig
from dp_runtime.startup.assembly import log_choices
from dp_runtime.startup.rank_plan import plan_rank
from tests.checkpoints import tiny_checkpoint


def test_choices_are_said_once_and_memory_by_every_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(str(tiny_checkpoint(tmp_path)), dp_size=2, num_pages=200)
    first = plan_rank(config, 0, "cpu")
    with caplog.at_level(logging.INFO, logger="dp_runtime"):
        log_choices(first)
        log_choices(replace(first, sharding=replace(first.sharding, dp_rank=1)))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "attention backend torch_ref: the only backend for device cpu"
    assert lines[2] == "CUDA graphs off: " + first.graphs_reason
    assert [line.startswith("200 KV pages of 64 tokens, ") for line in lines] == [
        False, False, False, True, True,
    ]  # fmt: skip

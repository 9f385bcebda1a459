"""What a rank says of its choices at start."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dp_runtime import EngineConfig
from dp_runtime.attention.registry import choose_backend
from dp_runtime.layers.linear import Widened
from dp_runtime.startup.build_rank import log_choices
from dp_runtime.startup.rank_plan import plan_rank
from tests.checkpoints import tiny_checkpoint
from tests.hybrid_checkpoints import hybrid_checkpoint


def test_choices_are_said_once_and_memory_by_every_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(str(tiny_checkpoint(tmp_path)), dp_size=2, num_pages=200)
    first = plan_rank(config, 0, "cpu")
    with caplog.at_level(logging.INFO, logger="dp_runtime"):
        log_choices(first)
        log_choices(replace(first, sharding=replace(first.sharding, position=1)))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "attention backend torch_ref: the only backend for device cpu"
    assert lines[2] == "CUDA graphs off: " + first.graphs_reason
    assert lines[3] == "prefix cache on: " + first.prefix_cache.reason
    assert [line.startswith("200 KV pages of 64 tokens, ") for line in lines] == [
        False, False, False, False, True, True,
    ]  # fmt: skip


def test_e4m3_that_is_widened_is_said_once_for_all_layers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(str(tiny_checkpoint(tmp_path)), dp_size=2, num_pages=200)
    plan = plan_rank(config, 0, "cpu")
    widened = tuple(Widened(f"model.layers.{n}.a", "it has a bias", 2**20) for n in range(3))
    plan = replace(
        plan, dense=replace(plan.dense, widened=widened), model=replace(plan.model, fp8_exempt=())
    )
    log_choices(plan)
    log_choices(replace(plan, sharding=replace(plan.sharding, position=1)))
    (record,) = caplog.records
    text = "model.layers.*.a is e4m3, and widened to 3.0 MiB: it has a bias"
    assert (record.levelno, record.getMessage()) == (logging.WARNING, text)


@pytest.mark.parametrize(("device", "backend", "level"), [
    ("cuda:0", "auto", logging.WARNING), ("cuda:0", "torch_ref", logging.INFO),
    ("cpu", "auto", logging.INFO),
])  # fmt: skip
def test_a_gpu_without_the_gpu_extra_is_a_warning(
    device: str,
    backend: str,
    level: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dp_runtime.attention.support.find_spec", lambda name: None)
    plan = plan_rank(EngineConfig(str(tiny_checkpoint(tmp_path)), num_pages=200), 0, "cpu")
    chosen, reason = choose_backend(backend, plan.attention, torch.device(device))
    with caplog.at_level(logging.INFO, logger="dp_runtime"):
        log_choices(replace(plan, device=device, backend=chosen, backend_reason=reason))
    record = caplog.records[0]
    assert record.levelno == level
    if level == logging.WARNING:
        assert record.getMessage() == (
            "attention backend torch_ref is slow on cuda:0: flashinfer is not installed: "
            "pip install 'dp-runtime[gpu]'"
        )


@pytest.mark.parametrize(("device", "level", "text"), [
    ("cpu", logging.INFO, "recurrent layers run in torch: "),
    ("cuda:0", logging.INFO, "recurrent layers run in Triton kernels"),
])  # fmt: skip
def test_how_recurrent_layers_run_is_said(
    device: str, level: int, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_rank(EngineConfig(str(hybrid_checkpoint(tmp_path)), num_pages=200), 0, "cpu")
    with caplog.at_level(logging.INFO, logger="dp_runtime"):
        log_choices(replace(plan, device=device))
    (record,) = [one for one in caplog.records if one.getMessage().startswith(text)]
    assert record.levelno == level

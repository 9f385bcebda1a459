"""Recordings of engines whose ranks are threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.metrics.recording import Recording
from tests.checkpoints import tiny_checkpoint

LENGTHS = [(40, 9), (3, 14), (17, 1), (70, 6), (5, 12), (1, 20), (33, 4), (8, 8), (20, 3), (60, 10)]


def record(model: Path, overlap: bool) -> Recording:
    """Serve requests of many lengths on few pages: some are preempted, some wait for a place."""
    config = EngineConfig(
        str(model), dp_size=3, device="cpu", launcher="thread", page_size=4, num_pages=26,
        max_model_len=96, max_num_requests=3, max_num_tokens=32, overlap=overlap, max_moves=0,
    )  # fmt: skip
    prompts = [[7 + number, *range(20, 19 + length)] for number, (length, _) in enumerate(LENGTHS)]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for _, n in LENGTHS]
    with Engine(config) as engine:
        handles = list(map(engine.submit, prompts, params))
        for handle in handles:
            handle.result()
        others = [[50 + prompt[0], *prompt[1:]] for prompt in prompts[::-1]]
        handles += map(engine.submit, others, params[::-1], [0] * 7 + [1] * 3)
        for handle in handles:
            handle.result()
        return engine.recording(handles)


@pytest.fixture(scope="package")
def replay_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("recorded") / "model")


@pytest.fixture(scope="package")
def recordings(replay_model: Path) -> dict[bool, Recording]:
    return {overlap: record(replay_model, overlap) for overlap in (False, True)}

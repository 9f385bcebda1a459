"""Mixtral with a sliding window serves sequences up to the window, with transformers' tokens."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dp_runtime.config import EngineConfig
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.engine import Engine
from tests.checkpoints import tiny_checkpoint
from tests.reference import Reference, check_greedy

WINDOW = 24


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("window")
    return tiny_checkpoint(directory, "MixtralForCausalLM", sliding_window=WINDOW)


def config(model: Path, max_model_len: int | None = None) -> EngineConfig:
    return EngineConfig(
        str(model), launcher="thread", max_num_requests=4, max_model_len=max_model_len
    )


def test_up_to_the_window(windowed: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [tuple(range(3, 3 + length)) for length in (2, 9, WINDOW - 6)]
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=2)
    with caplog.at_level(logging.INFO, "dp_runtime"), Engine(config(windowed)) as engine:
        outputs = engine.generate([list(prompt) for prompt in prompts], greedy)
        with pytest.raises(ValueError, match=f"{WINDOW}"):
            engine.generate([list(range(WINDOW))], greedy)
    check_greedy(Reference(windowed), outputs, prompts)
    assert f"max_model_len is {WINDOW}: the model's sliding_window" in caplog.text


def test_beyond_the_window(windowed: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"max_model_len: {WINDOW + 1} .* sliding_window {WINDOW}"
    ):
        Engine(config(windowed, WINDOW + 1))

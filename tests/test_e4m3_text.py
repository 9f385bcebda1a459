"""Trained models in e4m3, forced to held-out text on CPU ranks, against what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams
from tests.e4m3_checkpoints import TRAINED, e4m3_checkpoint
from tests.gpu.peers import ROUNDED, compare, next_logprobs
from tests.gpu.test_accuracy import held_out
from tests.serving import check_pages_free

LENGTHS = (130, 40, 3)
IN_CHUNKS: dict[str, Any] = {"max_num_tokens": 48, "max_num_requests": 8}


def serve(checkpoint: Path, **fields: Any) -> list[RequestOutput]:
    config = EngineConfig(
        str(checkpoint), device="cpu", launcher="thread", max_model_len=192, **fields
    )
    params = SamplingParams(
        max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    with Engine(config) as engine:
        outputs = engine.generate(held_out(checkpoint, LENGTHS), params)
        check_pages_free(engine)
    return outputs


@pytest.mark.parametrize("model", ["tiny_moe", "tiny_hybrid"])
def test_forced_text_has_the_log_probabilities_of_the_widened_model(
    tmp_path: Path, model: str
) -> None:
    narrow, wide = e4m3_checkpoint(tmp_path, model)
    outputs = [
        *serve(narrow),
        *serve(narrow, dp_size=2, moe_sharding="tp", poison_padding=True, **IN_CHUNKS),
    ]
    for differences in compare(wide, outputs, "cpu"):
        assert differences.ours.max() < 1e-3
    (prompt, *_) = held_out(narrow, LENGTHS)
    losses = [
        -float(next_logprobs(path, torch.float32, [prompt], "cpu")[0].mean())
        for path in (TRAINED / model / "checkpoint", wide)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=0.1), "the model is still the trained one"


def test_an_e4m3_cache_is_attended_to_as_rounded_keys_and_values_are() -> None:
    checkpoint = TRAINED / "tiny_moe" / "checkpoint"
    outputs = serve(checkpoint, kv_cache_dtype="fp8_e4m3", **IN_CHUNKS)
    medians = {}
    for attention in (ROUNDED, None):
        forced, _ = compare(checkpoint, outputs, "cpu", attention)
        medians[attention] = float(forced.ours.median())  # a value may tie where it is rounded
    assert medians[ROUNDED] < 1e-4
    assert medians[None] > 1e-2

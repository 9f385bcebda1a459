"""Texts that fit what was asked for, from GPU ranks: masks go up while passes run."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams, StructuredOutputs
from dp_runtime.core.request import FinishReason
from tests.gpu.test_engine import TINY_MODEL
from tests.serving import check_pages_free

pytest.importorskip("llguidance")
REGEX = r"[A-Z][a-z]{2,9}( [a-z]{1,9}){3,9}\."
POINT = {
    "type": "object", "required": ["x", "y"], "additionalProperties": False,
    "properties": {axis: {"type": "integer", "minimum": 0, "maximum": 999} for axis in "xy"},
}  # fmt: skip
POINTS = {"type": "array", "items": POINT, "minItems": 3, "maxItems": 3}
WANTED = [
    StructuredOutputs(regex=REGEX),
    StructuredOutputs(json=POINTS),
    StructuredOutputs(choice=["yes", "no", "maybe so"]),
    None,
]
PARAMS = [
    SamplingParams(max_tokens=300, temperature=heat, seed=n, structured_outputs=WANTED[n % 4])
    for heat in (0.0, 0.8)
    for n in range(20)
]


def check_fits(wanted: StructuredOutputs, output: RequestOutput) -> None:
    assert output.finish_reason is FinishReason.STOP, output.text
    match wanted:
        case StructuredOutputs(regex=str(regex)):
            assert re.fullmatch(regex, output.text)
        case StructuredOutputs(choice=tuple(choices)):
            assert output.text in choices
        case _:
            points = json.loads(output.text)
            assert len(points) == 3
            assert all(0 <= point["x"] <= 999 and 0 <= point["y"] <= 999 for point in points)


CASES: dict[str, dict[str, Any]] = {
    "eager": {"overlap": False, "cuda_graphs": False},
    "overlap": {},
    "overlap, preempted": {"page_size": 64, "num_pages": 10, "max_model_len": 512},
    "drafts": {"speculative_num_steps": 3},
    "adaptive drafts of two ranks": {
        "speculative_num_steps": 4, "speculative_adaptive": True, "dp_size": 2,
    },
    "two ranks": {"dp_size": 2, "poison_padding": True},
}  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_all_texts_fit(case: str) -> None:
    fields = {"dp_size": 1, "max_model_len": 1024, "max_num_requests": 32} | CASES[case]
    if torch.cuda.device_count() < fields["dp_size"]:
        pytest.skip(f"{fields['dp_size']} GPUs are needed")
    with Engine(EngineConfig(str(TINY_MODEL), launcher="local", device="cuda", **fields)) as engine:
        outputs = engine.generate([f"Number {n} is" for n in range(len(PARAMS))], PARAMS)
        check_pages_free(engine)
        report = engine.report()
    for params, output in zip(PARAMS, outputs, strict=True):
        if params.structured_outputs is not None:
            check_fits(params.structured_outputs, output)
    assert (report.preemptions > 0) == ("preempted" in case)
    assert (report.drafts_accepted > 0) == ("drafts" in case)

"""What is said where a rank's memory is too small, and that it helps."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from dp_runtime import EngineConfig
from dp_runtime.startup import memory_plan
from dp_runtime.startup.inspection import describe
from dp_runtime.startup.rank_plan import plan_rank, sketch_rank
from tests.checkpoints import tiny_checkpoint

SMALL: dict[str, Any] = {
    "max_model_len": 512, "max_num_tokens": 64, "max_num_requests": 2, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = tmp_path_factory.mktemp("model")
    tiny_checkpoint(path, max_position_embeddings=1024)
    return EngineConfig(str(path), **SMALL)


def memory_of(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(memory_plan, "rank_memory", lambda *arguments: num_bytes)


def without_pages(config: EngineConfig) -> int:
    return replace(sketch_rank(config, 0, "cpu").memory, kv_cache=0).total


def shortage_of(config: EngineConfig) -> str:
    """The error of a start, which inspect shows below the shapes."""
    with pytest.raises(ValueError, match=r"^\w+: .* is not allowed; ") as caught:
        plan_rank(config, 0, "cpu")
    text = str(caught.value)
    assert "\n" not in text
    shown = describe(config, "cpu")
    assert shown.splitlines()[-1] == f"does not fit: {text}"
    assert "hidden" in shown
    assert "KV pages" in shown
    return text


@pytest.mark.parametrize("fraction", [None, 1.0])
@pytest.mark.parametrize("num_pages", [None, 100])
def test_weights_that_exceed_the_memory(
    config: EngineConfig, fraction: float | None, num_pages: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    memory_of(monkeypatch, sketch_rank(config, 0, "cpu").memory.weights // 2)
    text = shortage_of(replace(config, kv_memory_fraction=fraction, num_pages=num_pages))
    assert text.startswith("model: ")
    assert "dtype bfloat16 halves the weights" in text
    assert "kv_memory_fraction" not in text
    assert "max_model_len" not in text


def test_activations_that_exceed_it(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(config, max_num_tokens=4096)
    memory_of(monkeypatch, without_pages(large) - 1)
    assert shortage_of(large).endswith(
        "lower max_num_tokens or max_num_requests, by which the activations grow"
    )
    plan_rank(config, 0, "cpu")  # the advice helps


def test_a_fraction_that_is_too_small(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = sketch_rank(config, 0, "cpu").page_bytes
    memory_of(monkeypatch, without_pages(config) + 12 * page)
    text = shortage_of(replace(config, kv_memory_fraction=0.5))
    length = int(re.findall(r"max_model_len (\d+) fits", text)[0])
    fraction = float(re.findall(r"kv_memory_fraction ([\d.]+) is enough", text)[0])
    assert (length, fraction) == (5 * 64, 0.75)  # 9 pages of 12 hold 512 tokens and the null page
    plan_rank(replace(config, kv_memory_fraction=fraction), 0, "cpu")
    plan_rank(replace(config, kv_memory_fraction=0.5, max_model_len=length), 0, "cpu")
    shortage_of(replace(config, kv_memory_fraction=0.5, max_model_len=length + 1))


def test_a_sequence_that_exceeds_what_is_left(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = sketch_rank(config, 0, "cpu").page_bytes
    memory_of(monkeypatch, without_pages(config) + 4 * page)
    text = shortage_of(replace(config, kv_memory_fraction=1.0))
    assert text.startswith("max_model_len: 512 is not allowed; ")
    assert text.endswith("max_model_len 192 fits")  # and no fraction, which can't help
    plan_rank(replace(config, kv_memory_fraction=1.0, max_model_len=192), 0, "cpu")


def test_too_many_pages(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    page = sketch_rank(config, 0, "cpu").page_bytes
    memory_of(monkeypatch, without_pages(config) + 20 * page)
    text = shortage_of(replace(config, num_pages=21))
    assert text.startswith("num_pages: 21 is not allowed; ")
    assert text.endswith("at most 20 fit")
    plan_rank(replace(config, num_pages=20), 0, "cpu")
    with pytest.raises(ValueError, match=r"^num_pages: 8 is not allowed; at least 9: "):
        describe(replace(config, num_pages=8), "cpu")  # no memory would help

"""The trained tiny models in e4m3 on GPU ranks, forced to held-out text.

They are compared with transformers in float32 over what e4m3 stands for, beside its bf16 over that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dp_runtime import Engine
from dp_runtime.kernels.fp8_linear.tiles import NUM_COUNTERS
from dp_runtime.weights.fp8_blocks import SCALE_SUFFIX, num_blocks
from tests.e4m3_checkpoints import TRAINED, e4m3_checkpoint
from tests.gpu.peers import ROUNDED, compare
from tests.gpu.test_accuracy import PATHS, RANKS, check_path, config_of, force, need_gpus
from tests.hybrid_checkpoints import read

KEPT = {"dense_backend": "triton"}
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("tiny_moe", "whole prompts", "1 rank", {}),
    ("tiny_moe", "chunks of 96", "1 rank", {}),
    ("tiny_moe", "one token a step", "1 rank", {}),
    ("tiny_moe", "whole prompts", "1 rank", KEPT),
    ("tiny_moe", "one token a step", "1 rank", KEPT),
    ("tiny_hybrid", "whole prompts", "1 rank", {}),
    ("tiny_hybrid", "chunks of 96", "1 rank", KEPT),
    ("tiny_moe", "whole prompts", "2 ranks", {}),
    ("tiny_moe", "chunks of 96", "2 ranks", {"moe_sharding": "ep", "poison_padding": True}),
    ("tiny_hybrid", "chunks of 96", "2 ranks", KEPT),
]
Pair = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return cache(lambda model: e4m3_checkpoint(tmp_path_factory.mktemp("e4m3"), model))


def held_bytes(checkpoint: Path, dp_size: int, keeps_dense: bool) -> float:
    """Count what a rank holds if experts stay e4m3, and the other matrices do or are widened."""
    total, tensors = 0.0, read(checkpoint)
    for name, tensor in tensors.items():
        scales = tensors.get(name + SCALE_SUFFIX)
        if ".experts." in name:  # with their scales, which have names of their own
            total += tensor.nbytes / dp_size
        elif scales is not None and keeps_dense:
            outputs, inputs = tensor.shape
            total += tensor.nbytes + outputs * num_blocks(inputs) * 4
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                total += 2 * NUM_COUNTERS * 4  # of its kernel, and of what is before it
        elif not name.endswith(SCALE_SUFFIX):
            total += tensor.numel() * 2
    return total


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "path", "ranks", "fields"), CASES, ids=str)
def test_forced_text_is_as_near_to_the_widened_model_as_transformers_in_bf16(
    pair: Pair, model: str, path: str, ranks: str, fields: dict[str, Any]
) -> None:
    need_gpus(ranks)
    narrow, wide = pair(model)
    lengths, num_outputs, limits = PATHS[path]
    config = config_of(narrow, **RANKS[ranks] | limits | fields)
    with Engine(config) as engine:
        outputs = force(engine, narrow, lengths, num_outputs)
        health = engine.health()
    due = held_bytes(narrow, config.dp_size, "dense_backend" in fields)
    for rank in health:
        assert rank.memory is not None
        assert rank.memory.measured is not None
        assert rank.memory.measured.weights == pytest.approx(due, rel=0.01), "kept, not widened"
    check_path(path, f"{model} in e4m3, {path}, {ranks}, {fields}", compare(wide, outputs))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", PATHS)
def test_an_e4m3_cache_costs_what_its_rounding_does(path: str) -> None:
    """transformers rounds keys and values in both dtypes; in bf16 what kernels round as well."""
    checkpoint = TRAINED / "tiny_moe" / "checkpoint"
    lengths, num_outputs, limits = PATHS[path]
    fields = limits | {"kv_cache_dtype": "fp8_e4m3", "attention_backend": "trtllm"}
    with Engine(config_of(checkpoint, **fields)) as engine:
        outputs = force(engine, checkpoint, lengths, num_outputs)
    differences = compare(checkpoint, outputs, attention=ROUNDED)
    check_path(path, f"tiny_moe over an e4m3 cache, {path}", differences)

"""The tiny trained models on GPU ranks, forced to held-out text, against transformers in float32.

Every position of the text counts: the log probability of its true next token. Whole prompts and
chunks of them go through the prefill kernel; with a budget of one token a step every prompt token
goes through the decode kernel; what is generated behind them goes through it in batches.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams
from dp_runtime.text.tokenizer import Tokenizer
from tests.gpu.peers import Differences, compare
from tests.serving import check_pages_free

EXAMPLES = Path(__file__).parents[2] / "examples"
LENGTHS = (3, 17, 63, 64, 65, 129, 250, 511, 512, 513, 640, 777, 1000, 1200)  # 5,744 in all
PATHS = {  # prompts, output tokens of each, limits of a step
    "whole prompts": (4 * LENGTHS, 128, {"max_num_tokens": 2048}),
    "chunks of 96": (4 * LENGTHS, 128, {"max_num_tokens": 96}),
    "one token a step": (LENGTHS, 1, {"max_num_tokens": 1, "max_num_requests": 1}),
}
RANKS: dict[str, dict[str, Any]] = {
    "1 rank": {"dp_size": 1},
    "2 ranks": {"dp_size": 2, "moe_sharding": "tp", "padding": "ragged"},
    "4 ranks": {"dp_size": 4, "overlap": True, "poison_padding": True},
    "4 ranks, 2 on a GPU": {"dp_size": 4, "ranks_per_gpu": 2, "poison_padding": True},
}

CASES = [  # of tiny_moe
    ("whole prompts", "1 rank"),
    ("chunks of 96", "1 rank"),
    ("one token a step", "1 rank"),
    ("whole prompts", "2 ranks"),
    ("one token a step", "2 ranks"),
    ("chunks of 96", "4 ranks"),
    ("chunks of 96", "4 ranks, 2 on a GPU"),
]
HYBRID_CASES = [(path, "1 rank") for path in PATHS] + [("chunks of 96", "2 ranks")]
OF_MODELS = [("tiny_moe", *case) for case in CASES] + [
    ("tiny_hybrid", *case) for case in HYBRID_CASES
]


def held_out(checkpoint: Path, lengths: tuple[int, ...]) -> list[list[int]]:
    """Prompts of these lengths: consecutive, disjoint pieces of the held-out text."""
    tokenizer = Tokenizer((checkpoint / "tokenizer.json").read_text())
    tokens = iter(tokenizer.encode((EXAMPLES / "tiny_moe" / "held_out.txt").read_text()))
    prompts = [list(islice(tokens, length)) for length in lengths]
    assert [len(prompt) for prompt in prompts] == list(lengths), "there is enough text"
    return prompts


def config_of(checkpoint: Path, **fields: Any) -> EngineConfig:
    return EngineConfig(
        str(checkpoint), launcher="local", num_pages=600, max_model_len=1400,
        start_timeout_s=600.0, **dict[str, Any](device="cuda") | fields,
    )  # fmt: skip


def force(
    engine: Engine, checkpoint: Path, lengths: tuple[int, ...], num_outputs: int
) -> list[RequestOutput]:
    """Force the text, and go on greedily behind it."""
    params = SamplingParams(
        max_tokens=num_outputs, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    ranks = [index % engine.config.dp_size for index in range(len(lengths))]
    outputs = engine.generate(held_out(checkpoint, lengths), params, ranks)
    check_pages_free(engine)
    return outputs


def need_gpus(ranks: str) -> None:
    gpus = RANKS[ranks]["dp_size"] // RANKS[ranks].get("ranks_per_gpu", 1)
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"{gpus} GPUs are needed, {torch.cuda.device_count()} are here")


def check_path(
    path: str, what: str, differences: tuple[Differences, Differences], max_ratio: float = 1.25
) -> None:
    """Assert that every position was compared, and that log probabilities are near enough."""
    lengths, num_outputs, _ = PATHS[path]
    at_prompt, at_output = differences
    assert len(at_prompt.ours) == sum(lengths) - len(lengths)
    assert len(at_output.ours) == num_outputs * len(lengths)
    at_prompt.check(f"{what}, forced", max_ratio)
    if num_outputs > 1:
        at_output.check(f"{what}, generated in batches", max_ratio)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "path", "ranks"), OF_MODELS)
def test_forced_text_is_as_near_to_float32_as_transformers_in_bf16(
    model: str, path: str, ranks: str
) -> None:
    need_gpus(ranks)
    lengths, num_outputs, limits = PATHS[path]
    checkpoint = EXAMPLES / model / "checkpoint"
    with Engine(config_of(checkpoint, **{**RANKS[ranks], **limits})) as engine:
        outputs = force(engine, checkpoint, lengths, num_outputs)
    check_path(path, f"{model}, {path}, {ranks}", compare(checkpoint, outputs))

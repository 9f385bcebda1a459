"""The Qwen3.5 MoE family and Qwen3-Next against transformers, in chunks and over several ranks.

Numbers in names are those of the groups of mistakes that other runtimes made with such models.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_runtime.parallel.padding import PaddingMode
from tests.dp_runtime.models.ranks import Rank, check_bfloat16, check_dummy_weights, close
from tests.dp_runtime.thread_ranks import ThreadCollective, run_ranks
from tests.hybrid_checkpoints import NEXT, TEXT, VISION, hybrid_checkpoint, oracle

FULL, LINEAR = "full_attention", "linear_attention"
ROPE = {"rope_type": "default", "rope_theta": 1e7}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (TEXT, {}),
    "text beside a vision model": (VISION, {}),
    "next": (NEXT, {}),
    "only attention": (TEXT, {"layer_types": [FULL] * 2, "num_hidden_layers": 2}),
    "attention first": (TEXT, {"layer_types": [FULL, LINEAR, LINEAR], "num_hidden_layers": 3}),
    "one v head a k head": (TEXT, {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 2}),
    "next, many v heads": (NEXT, {"linear_num_value_heads": 8, "linear_key_head_dim": 32}),
    "next, dense layers": (NEXT, {"mlp_only_layers": [1], "intermediate_size": 56}),
    "next, raw top-k": (NEXT, {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "tied": (TEXT, {"tie_word_embeddings": True, "num_experts": 7}),
    "tied beside a vision model": (VISION, {"tie_word_embeddings": True}),
    "half rotated": (TEXT, {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "all rotated, head_dim 64": (
        TEXT, {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}, "head_dim": 64},
    ),
    "yarn": (
        NEXT,
        {
            "rope_parameters": {**YARN, "original_max_position_embeddings": 64,
                                "partial_rotary_factor": 0.25},
            "max_position_embeddings": 256,
        },
    ),
}  # fmt: skip


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 180, count).tolist()


def expected_logits(path: Path, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = oracle(path)(torch.tensor([tokens])).logits[0]
        return logits


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, overrides = VARIANTS[request.param]
    return hybrid_checkpoint(tmp_path_factory.mktemp("model"), architecture, **overrides)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hybrid_checkpoint(tmp_path_factory.mktemp("text"), num_experts=7)


def test_prefill_chunks_and_decode(variant: Path) -> None:
    tokens = random_tokens(140)
    expected = expected_logits(variant, tokens)
    assert expected.argmax(-1).unique().numel() > 20, "the checkpoint must not repeat itself"

    def run(collective: ThreadCollective) -> None:
        whole = Rank(variant, collective)
        close(whole.step([tokens])[0], expected)
        parts = Rank(variant, collective)
        for start, stop in ((0, 66), (66, 67), (67, 124)):
            close(parts.step([tokens[start:stop]])[0], expected[start:stop])
        for position in range(124, 140):
            close(parts.step([[tokens[position]]])[0], expected[position : position + 1])

    run_ranks(1, run)


@pytest.mark.parametrize("chunk", [1, 2, 3, 37, 64, 65])
def test_chunks_that_a_state_carries_equal_the_whole_prompt_1_4_5_7(text: Path, chunk: int) -> None:
    """On a slot that another sequence has left dirty, where chunks are as short as one row."""
    tokens, other = random_tokens(133), random_tokens(50, 1)
    expected = expected_logits(text, tokens)

    def run(collective: ThreadCollective) -> None:
        worker = Rank(text, collective)
        worker.step([other])
        worker.end(0)
        for start in range(0, len(tokens), chunk):
            rows = tokens[start : start + chunk]
            close(worker.step([rows])[0], expected[start : start + len(rows)])

    run_ranks(1, run)


@pytest.mark.parametrize("length", range(1, 10))
def test_no_length_of_a_prompt_is_taken_for_a_decode_1_2_3(text: Path, length: int) -> None:
    """Prompts of one row, of as many as a verification has, and one more; then a decode."""
    tokens, other = random_tokens(length + 1, 2), random_tokens(40, 3)
    expected = expected_logits(text, tokens)

    def run(collective: ThreadCollective) -> None:
        worker = Rank(text, collective, num_sequences=2)
        worker.step([other, other[:5]])
        for _ in range(2):  # the second time, as a preempted request begins again
            worker.end(0)
            close(worker.step([tokens[:length], other[5:6]])[0], expected[:length])
        close(worker.step([tokens[length:], []])[0], expected[length:])

    run_ranks(1, run)


def test_sequences_in_one_pass_keep_to_their_slots_8_12_15(text: Path) -> None:
    """Prefill, decodes and idle sequences together; no other slot changes by a bit."""
    prompts = [random_tokens(60, seed) for seed in range(5)]
    expected = [expected_logits(text, prompt) for prompt in prompts]
    schedule = [
        [7, 0, 20, 1, 2], [1, 12, 4, 1, 1], [1, 1, 0, 30, 12], [4, 4, 4, 4, 4], [1, 1, 1, 0, 9]
    ]  # fmt: skip

    def run(collective: ThreadCollective) -> None:
        worker, done = Rank(text, collective, num_sequences=5), [0] * 5
        states = [tensor for state in worker.caches.states for tensor in state]
        for counts in schedule:
            used = {worker.slots[i] for i, count in enumerate(counts) if count}
            idle = [slot for slot in range(worker.num_slots) if slot not in used]
            before = [state[idle].view(torch.uint8).clone() for state in states]
            new = [p[d : d + c] for p, d, c in zip(prompts, done, counts)]
            for i, logits in enumerate(worker.step(new)):
                close(logits, expected[i][done[i] : done[i] + counts[i]])
            done = [d + c for d, c in zip(done, counts)]
            for state, kept in zip(states, before):
                assert torch.equal(state[idle].view(torch.uint8), kept)

    run_ranks(1, run)


@pytest.mark.parametrize("moe_sharding", ["ep", "tp"])
@pytest.mark.parametrize("dp_size", [2, 3, 4])
def test_ranks_with_different_work_9_10(text: Path, dp_size: int, moe_sharding: str) -> None:
    """Prefill on one rank, decode on another, nothing on the last; padded rows hold NaN."""
    steps = [
        [12 if rank == 0 else rank for rank in range(dp_size)],
        [1] + [5] * (dp_size - 2) + [0],
        [0] * (dp_size - 1) + [9],
    ]
    prompts = [random_tokens(40, rank) for rank in range(dp_size)]
    expected = [expected_logits(text, prompt) for prompt in prompts]

    def run(collective: ThreadCollective) -> None:
        rank = collective.dp_rank
        worker, done = Rank(text, collective, moe_sharding), 0
        for counts in steps:
            for mode in (PaddingMode.MAX_LEN, PaddingMode.RAGGED):
                new = prompts[rank][done : done + counts[rank]]
                logits = worker.step([new], tuple(counts), mode)[0]
                close(logits, expected[rank][done : done + counts[rank]])
                done += counts[rank]
        assert len(collective.calls) == len(steps) * 2 * 2 * worker.model.num_moe_layers

    run_ranks(dp_size, run)


@pytest.mark.parametrize("moe_sharding", ["ep", "tp"])
def test_padding_changes_no_bit_9(text: Path, moe_sharding: str) -> None:
    prompts = [random_tokens(20, rank) for rank in range(3)]

    def run(collective: ThreadCollective, poison: bool) -> Tensor:
        prompt, steps = prompts[collective.dp_rank], ((12, 0, 3), (1, 7, 0), (7, 13, 17))
        worker, done, found = Rank(text, collective, moe_sharding, poison=poison), 0, []
        for counts in steps:
            rows = counts[collective.dp_rank]
            found.append(worker.step([prompt[done : done + rows]], counts)[0])
            done += rows
        return torch.cat(found)

    clean, poisoned = (run_ranks(3, partial(run, poison=poison)) for poison in (False, True))
    for one, other in zip(clean, poisoned):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_zero_rows_on_all_ranks_10(text: Path) -> None:
    def run(collective: ThreadCollective) -> tuple[Tensor, list[str]]:
        return Rank(text, collective).step([[]], (0, 0))[0], collective.calls

    for logits, calls in run_ranks(2, run):
        assert logits.shape == (0, 199)
        assert calls == []


def test_a_state_in_bfloat16_is_near_one_in_float32_22(text: Path, tmp_path: Path) -> None:
    tokens = random_tokens(48)
    expected = expected_logits(text, tokens)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((text / name).read_bytes())
    fields = json.loads((text / "config.json").read_text()) | {"mamba_ssm_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(fields))

    def run(collective: ThreadCollective) -> Tensor:
        worker = Rank(tmp_path, collective)
        assert worker.caches.states[0][1].dtype == torch.bfloat16
        return torch.cat([worker.step([tokens[i : i + 6]])[0] for i in range(0, 48, 6)])

    found = run_ranks(1, run)[0]
    assert (found - expected).abs().max() > 1e-4
    assert (found - expected).abs().median() < 0.05


def test_bfloat16_agrees_with_transformers_in_bfloat16(text: Path) -> None:
    check_bfloat16(text, oracle(text), random_tokens(48))


def test_dummy_weights_give_the_same_model_on_any_number_of_ranks(text: Path) -> None:
    check_dummy_weights(text, random_tokens(16))

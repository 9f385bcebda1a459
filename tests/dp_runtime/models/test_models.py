"""Models against transformers: prefill, chunks and decode, over several ranks and variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_runtime.layers.rotary import Rotary
from dp_runtime.models.registry import read_model_config
from dp_runtime.parallel.padding import PaddingMode
from tests.checkpoints import oracle, tiny_checkpoint
from tests.dp_runtime.models.ranks import Rank, check_bfloat16, check_dummy_weights, close
from tests.dp_runtime.paged import CPU
from tests.dp_runtime.thread_ranks import ThreadCollective, run_ranks

QWEN, MIXTRAL = "Qwen3MoeForCausalLM", "MixtralForCausalLM"


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **fields}
    return {"rope_parameters": parameters, "max_position_embeddings": 256}


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": (QWEN, {}),
    "qwen bias": (QWEN, {"attention_bias": True}),
    "qwen tied": (QWEN, {"tie_word_embeddings": True}),
    "qwen head_dim": (QWEN, {"head_dim": 24, "num_key_value_heads": 1}),
    "qwen odd experts": (QWEN, {"num_experts": 7, "num_experts_per_tok": 3}),
    "qwen raw top-k": (QWEN, {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "qwen dense layers": (QWEN, {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "qwen sparse step": (QWEN, {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "qwen linear": (QWEN, rope("linear", factor=3.0)),
    "qwen yarn": (QWEN, rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen yarn all": (
        QWEN,
        rope(
            "yarn", factor=8.0, original_max_position_embeddings=512, attention_factor=0.9,
            beta_fast=16.0, beta_slow=2.0, truncate=False,
        ),
    ),
    "qwen llama3": (QWEN, rope("llama3", original_max_position_embeddings=64, **LLAMA3)),
    "mixtral": (MIXTRAL, {}),
    "mixtral head_dim, experts": (MIXTRAL, {"head_dim": 32, "num_local_experts": 5}),
    "mixtral tied, top-1": (MIXTRAL, {"tie_word_embeddings": True, "num_experts_per_tok": 1}),
}  # fmt: skip


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 199, count).tolist()


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, overrides = VARIANTS[request.param]
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), architecture, **overrides)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides: dict[str, Any] = {"num_experts": 7, "num_hidden_layers": 3, "mlp_only_layers": [1]}
    return tiny_checkpoint(tmp_path_factory.mktemp("qwen"), QWEN, **overrides)


def expected_logits(path: Path, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return oracle(path)(torch.tensor([tokens])).logits[0]


def test_prefill_chunks_and_decode(variant: Path) -> None:
    tokens = random_tokens(90)
    expected = expected_logits(variant, tokens)
    assert expected.argmax(-1).unique().numel() > 20, "the checkpoint must not repeat itself"

    def run(collective: ThreadCollective) -> None:
        whole = Rank(variant, collective)
        close(whole.step([tokens])[0], expected)
        parts = Rank(variant, collective)
        for start, stop in ((0, 33), (33, 34), (34, 70)):
            close(parts.step([tokens[start:stop]])[0], expected[start:stop])
        for position in range(70, 90):
            close(parts.step([[tokens[position]]])[0], expected[position : position + 1])

    run_ranks(1, run)


@pytest.mark.parametrize("moe_sharding", ["ep", "tp"])
@pytest.mark.parametrize("dp_size", [2, 3, 4])
def test_ranks_with_different_work(qwen: Path, dp_size: int, moe_sharding: str) -> None:
    """Prefill on one rank, decode on another, nothing on the last; padded rows hold NaN."""
    prompts = [random_tokens(20 + 7 * rank, rank) for rank in range(dp_size)]
    expected = [expected_logits(qwen, prompt) for prompt in prompts]
    steps = [
        [12 if rank == 0 else rank for rank in range(dp_size)],
        [1] + [5] * (dp_size - 2) + [0],
        [0] * (dp_size - 1) + [9],
    ]

    def run(collective: ThreadCollective) -> None:
        rank = collective.dp_rank
        worker, done = Rank(qwen, collective, moe_sharding), 0
        for counts in steps:
            for mode in (PaddingMode.MAX_LEN, PaddingMode.RAGGED):
                new = prompts[rank][done : done + counts[rank]]
                logits = worker.step([new], tuple(counts), mode)[0]
                close(logits, expected[rank][done : done + counts[rank]])
                done += counts[rank]
        assert len(collective.calls) == len(steps) * 2 * 2 * worker.model.num_moe_layers

    # the largest total any rank consumes is 2 * (12 + 1), and each prompt is longer or equal
    prompts[0] += random_tokens(10, 99)
    expected[0] = expected_logits(qwen, prompts[0])
    run_ranks(dp_size, run)


def test_prefill_decode_and_idle_sequences_in_one_slot(qwen: Path) -> None:
    prompts = [random_tokens(40, seed) for seed in range(4)]
    expected = [expected_logits(qwen, prompt) for prompt in prompts]
    schedule = [[7, 0, 20, 1], [1, 12, 4, 1], [1, 1, 0, 30], [4, 4, 4, 4], [1, 1, 1, 0]]

    def run(collective: ThreadCollective) -> None:
        worker, done = Rank(qwen, collective, num_sequences=4), [0] * 4
        for counts in schedule:
            new = [p[d : d + c] for p, d, c in zip(prompts, done, counts)]
            for i, logits in enumerate(worker.step(new)):
                close(logits, expected[i][done[i] : done[i] + counts[i]])
            done = [d + c for d, c in zip(done, counts)]

    run_ranks(1, run)


def test_embeds_replace_the_embeddings_of_their_rows(qwen: Path) -> None:
    tokens, other = random_tokens(12), random_tokens(12, 5)
    mixed = [*tokens[:3], *other[3:6], *tokens[6:]]
    embedding = oracle(qwen).get_input_embeddings().weight.detach()
    expected = expected_logits(qwen, mixed)

    def run(collective: ThreadCollective) -> Tensor:
        embeds = ([3, 4, 5], embedding[other[3:6]])
        return Rank(qwen, collective).step([tokens], embeds=embeds)[0]

    close(run_ranks(1, run)[0], expected)


def test_zero_rows_on_all_ranks(qwen: Path) -> None:
    def run(collective: ThreadCollective) -> tuple[Tensor, list[str]]:
        return Rank(qwen, collective).step([[]], (0, 0))[0], collective.calls

    for logits, calls in run_ranks(2, run):
        assert logits.shape == (0, 199)
        assert calls == []


def test_bfloat16_agrees_with_transformers_in_bfloat16(qwen: Path) -> None:
    check_bfloat16(qwen, oracle(qwen), random_tokens(48))


def test_dummy_weights_give_the_same_model_on_any_number_of_ranks(qwen: Path) -> None:
    check_dummy_weights(qwen, random_tokens(16))


def test_rotary_is_computed_in_float32(qwen: Path) -> None:
    config = read_model_config(str(qwen))
    rotary = Rotary.from_config(config.rope, config.head_dim, CPU)
    cos, _ = rotary(torch.tensor([2047]), torch.bfloat16)
    exact = (2047 * rotary.inv_freq.double()).cos()
    assert cos.dtype == torch.bfloat16
    assert (cos[0, 0].double() - exact).abs().max() < 2**-8

"""Two GPU ranks replay forwards in pieces beside each other: as eager steps, whoever has more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from dp_runtime import EngineConfig
from dp_runtime.core.request import PromptEmbeds, RankRequest, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan
from dp_runtime.parallel.buckets import GraphKey, PiecewiseBuckets
from dp_runtime.runner.graphs.forward_pieces import ForwardPieces
from examples.benchmarks.harness.stepping import IDS_A_RANK, Driver, SteppedRank, run_ranks
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.gpu.peers import ALL_EXPERTS

HIDDEN = 256
# [rank]: by step, the lengths of prompts that come before it, and how many tokens they are to give.
ARRIVALS: tuple[Mapping[int, tuple[tuple[int, int], ...]], ...] = (
    {0: ((5, 60),), 4: ((300, 3),), 6: ((40, 3),), 8: ((200, 3),), 10: ((20, 3),)},
    {2: ((9, 60), (3, 60)), 6: ((700, 3),), 8: ((100, 3),), 12: ((1200, 3),)},
)
# What must be replayed: alone, the largest beside decodes, not the largest, both, a few rows.
DUE: tuple[set[GraphKey], ...] = (
    {GraphKey(16, 16), GraphKey(384, 1024), GraphKey(64, 1024), GraphKey(256, 256),
     GraphKey(64, 64)},
    {GraphKey(16, 16), GraphKey(768, 1024), GraphKey(128, 256), GraphKey(1024, 1024)},
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """What one rank gave, by request: log probabilities of prompt tokens, and output tokens."""

    prompt_logprobs: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    keys: set[GraphKey] = field(default_factory=set)  # of pieces that were replayed


@dataclass(eq=False)
class Keeping(Driver):
    """Keeps what its rank delivers."""

    served: Served = field(default_factory=Served)

    def deliver(self, progress: list[RequestUpdate]) -> None:
        super().deliver([item for item in progress if item.token_ids])
        for item in progress:
            assert not item.error, item.error
            scored = self.served.prompt_logprobs.setdefault(item.request_id, [])
            scored.extend(entry.logprob for entry in item.prompt_logprobs)
            self.served.tokens.setdefault(item.request_id, []).extend(item.token_ids)


def requests(dp_rank: int, first_step: int) -> list[RankRequest]:
    """Score their prompts, so that no prefix cache keeps a prompt from being run again.

    Every other prompt has embeddings in place of some tokens'.
    """
    generator = np.random.default_rng(dp_rank)
    arrivals = [(step, *each) for step, some in ARRIVALS[dp_rank].items() for each in some]
    return [
        RankRequest(
            dp_rank * IDS_A_RANK + number, tuple(generator.integers(1, 199, length).tolist()),
            SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, prompt_logprobs=0),
            number, frozenset(), at_step=first_step + step,
            embeds=embeds(generator, length) if number % 2 else None,
        )
        for number, (step, length, count) in enumerate(arrivals)
    ]  # fmt: skip


def embeds(generator: np.random.Generator, length: int) -> PromptEmbeds:
    at = np.arange(0, length, 3)
    return PromptEmbeds(at, generator.standard_normal((len(at), HIDDEN), np.float32))


def serve(rank: SteppedRank) -> Served:
    own = requests(rank.dp_rank, rank.loop.coordinator.step_id)
    driver = Keeping(own, rank.loop.recorder)
    with torch.inference_mode():
        rank.loop.run(driver.take, driver.deliver)
    rank.links.collective.barrier()
    return driver.served


def serve_twice(rank: SteppedRank) -> tuple[Served, Served]:
    """In each rank's process: from graphs, and launched kernel by kernel."""
    forward = ForwardPieces.forward
    seen = set[GraphKey]()

    def seeing(own: ForwardPieces, inputs: PassInputs, plan: PassPlan, gathered: int) -> Hidden:
        seen.add(own.buckets.key(len(inputs.token_ids), gathered))
        return forward(own, inputs, plan, gathered)

    with mock.patch.object(ForwardPieces, "forward", seeing):
        from_graphs = replace(serve(rank), keys={*seen})
    coordinator, passes = rank.loop.coordinator, rank.loop.runner.passes
    for pass_kind, runner in passes.items():
        passes[pass_kind] = replace(runner, graphs={})
    coordinator.execute_by(replace(coordinator.execution, piecewise=PiecewiseBuckets()))
    return from_graphs, serve(rank)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_checkpoint(
        tmp_path_factory.mktemp("gpu"), hidden_size=HIDDEN, num_attention_heads=16,
        num_key_value_heads=2, head_dim=128, moe_intermediate_size=64, **ALL_EXPERTS,
    )  # fmt: skip
    return add_mtp(model)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["trtllm", "split"])
@pytest.mark.parametrize("num_drafts", [0, 3])
def test_pieces_give_the_log_probabilities_of_eager_steps(
    checkpoint: Path, num_drafts: int, backend: str
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"2 GPUs are needed, {torch.cuda.device_count()} are here")
    config = EngineConfig(
        str(checkpoint), launcher="local", device="cuda", dp_size=2, max_model_len=1536,
        max_num_tokens=1024, max_num_requests=16, num_pages=200, attention_backend=backend,
        overlap=True, poison_padding=True, speculative_num_steps=num_drafts,
    )  # fmt: skip
    for due, (one, other) in zip(DUE, run_ranks(config, serve_twice), strict=True):
        assert due <= one.keys
        check_alike(one, other)


def check_alike(one: Served, other: Served) -> None:
    """Allow what rounds otherwise in bf16; logits of other rows would be noise."""
    assert one.tokens.keys() == other.tokens.keys()
    first = [one.tokens[number][0] == other.tokens[number][0] for number in one.tokens]
    assert sum(first) > 0.5 * len(first)
    scores = [
        np.concatenate([served.prompt_logprobs[number] for number in sorted(served.tokens)])
        for served in (one, other)
    ]
    differences = np.abs(scores[0] - scores[1])
    mean, p99 = float(differences.mean()), float(np.quantile(differences, 0.99))
    print(f"{len(differences)} prompt tokens: mean {mean:.4f}, p99 {p99:.3f} apart")
    assert mean < 0.06
    assert p99 < 0.3

"""Two ranks capture all graphs and serve by them: the tokens of eager steps, whoever prefills."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from collectives.in_process import InProcessCollective
from dp_runtime.attention.kv_writer import KvWriter
from dp_runtime.config import EngineConfig
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan
from dp_runtime.parallel import buckets
from dp_runtime.parallel.buckets import GraphKey
from dp_runtime.parallel.step_board import StepBoard
from dp_runtime.runner.graphs.forward_pieces import ForwardPieces
from dp_runtime.startup.build_rank import assemble, load_rank, new_flight
from dp_runtime.startup.graph_capture import capture_all, plan_capture
from dp_runtime.startup.rank_plan import plan_rank
from examples.benchmarks.harness.stepping import Driver
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.collectives.ranks import run_threads
from tests.dp_runtime.parallel.test_row_exchange import Counted
from tests.dp_runtime.runner.graphs.test_forward_pieces import write
from tests.dp_runtime.runner.stand_ins import use_stand_ins

# [rank]: by step, the lengths of prompts that come before it, and how many tokens they are to give.
ARRIVALS: tuple[Mapping[int, tuple[tuple[int, int], ...]], ...] = (
    {0: ((5, 14),), 3: ((30, 3),), 6: ((3, 2),)},
    {1: ((2, 12),), 3: ((9, 3),), 6: ((40, 3),)},
)
# Alone, the largest, not the largest, and both alike.
DUE = {GraphKey(16, 16), GraphKey(32, 32), GraphKey(16, 32), GraphKey(4, 4)}


def requests(rank: int, first_step: int) -> list[RankRequest]:
    generator = np.random.default_rng(rank)
    arrivals = [(step, *each) for step, some in ARRIVALS[rank].items() for each in some]
    return [
        RankRequest(
            100 * rank + number, tuple(generator.integers(1, 199, length).tolist()),
            SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True),
            0, frozenset(), at_step=first_step + step,
        )
        for number, (step, length, count) in enumerate(arrivals)
    ]  # fmt: skip


def serve(
    inner: InProcessCollective, board: StepBoard, model: Path, captures: bool, num_drafts: int
) -> dict[int, list[int]]:
    """Serve one rank's arrivals; its output tokens by request."""
    config = EngineConfig(
        str(model), dp_size=2, launcher="thread", device="cpu", max_model_len=64, num_pages=60,
        max_num_requests=4, max_num_tokens=32, poison_padding=True,
        speculative_num_steps=num_drafts,
    )  # fmt: skip
    plan = plan_rank(config, inner.dp_rank, "cpu")
    loaded, flight = load_rank(config, plan, lambda count: None), new_flight(config, plan)
    tokens: dict[int, list[int]] = {}
    with torch.inference_mode():
        loop = assemble(config, plan, loaded, board, Counted(inner), flight)
        if captures:
            capture_all(loop, plan_capture(plan, loop, lambda done, total: None))
        driver = Driver(requests(inner.dp_rank, loop.coordinator.step_id), loop.recorder)

        def deliver(progress: list[RequestUpdate]) -> None:
            for item in progress:
                assert not item.error, item.error
                tokens.setdefault(item.request_id, []).extend(item.token_ids)
            driver.deliver([item for item in progress if item.token_ids])

        loop.run(driver.take, deliver)
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_graphs_give_the_tokens_of_eager_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_drafts: int
) -> None:
    use_stand_ins(monkeypatch, interprets=False)
    monkeypatch.setattr(KvWriter, "write", write)  # one thread at a time
    monkeypatch.setattr(buckets, "SMALLEST", 4)
    monkeypatch.setattr(buckets, "MIN_PIECES", 8)
    replayed, forward = set[GraphKey](), ForwardPieces.forward

    def seeing(own: ForwardPieces, inputs: PassInputs, plan: PassPlan, gathered: int) -> Hidden:
        replayed.add(own.buckets.key(len(inputs.token_ids), gathered))
        return forward(own, inputs, plan, gathered)

    monkeypatch.setattr(ForwardPieces, "forward", seeing)
    model = add_mtp(tiny_checkpoint(tmp_path))
    served = []
    for captures in (False, True):
        ranks = run_threads(2, 60.0, serve, (model, captures, num_drafts))
        served.append([rank.result() for rank in ranks])
        assert captures or not replayed
    assert served[0] == served[1]
    assert replayed >= DUE

"""One rank of a hybrid model that serves a script of arrivals, and what it replayed and touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collectives.in_process import InProcessGroup
from dp_runtime.config import EngineConfig
from dp_runtime.core.attention_metadata import Place
from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.step_program import Pass
from dp_runtime.runner.graphs.forward_pieces import ForwardPieces
from dp_runtime.runner.graphs.pass_graphs import PassGraphs, PassOutput
from dp_runtime.runner.step_loop import Inbox, StepLoop
from dp_runtime.startup.build_rank import assemble, load_rank, new_flight
from dp_runtime.startup.graph_capture import capture_all, plan_capture
from dp_runtime.startup.rank_plan import plan_rank

# Lengths of prompts and outputs by the step that they arrive before: one joins others that decode,
# one of a single token is fresh in a decode graph, one is cut into chunks; all end at other times.
ARRIVALS: Mapping[int, tuple[tuple[int, int], ...]] = {
    0: ((9, 9), (3, 4), (1, 6)), 4: ((1, 3),), 5: ((40, 2),),
}  # fmt: skip
NUM_REQUESTS = 5


@dataclass
class Served:
    tokens: dict[int, list[int]] = field(default_factory=dict)
    experts: dict[int, list[object]] = field(default_factory=dict)
    replays: list[tuple[object, int, bool]] = field(default_factory=list)  # pass, requests, fresh
    in_pieces: int = 0


def bits(tensor: Tensor) -> Tensor:
    """Bytes, of which those of a NaN are equal to themselves: [slots, bytes]."""
    return tensor.flatten(1).view(torch.uint8)


def serve(
    checkpoint: Path,
    patch: pytest.MonkeyPatch,
    *,
    captures: bool,
    num_drafts: int,
    device: str = "cpu",
    **others: Any,
) -> Served:
    """Serve the arrivals on one rank whose states are dirty at first, by graphs if it captures."""
    served, group = Served(), InProcessGroup(1, 30.0)
    config = EngineConfig(
        str(checkpoint), dp_size=1, launcher="thread", max_model_len=64, num_pages=40,
        device=torch.device(device).type, max_num_requests=4,
        max_num_tokens=max(24, 4 * (1 + num_drafts)),
        poison_padding=True, speculative_num_steps=num_drafts, enable_return_routed_experts=True,
        **others,
    )  # fmt: skip
    plan = plan_rank(config, 0, device)
    loaded = load_rank(config, plan, lambda count: None)
    board, collective = group.board(0), group.collective(0)
    loop = assemble(config, plan, loaded, board, collective, new_flight(config, plan))
    states = [tensor for state in loaded.states for tensor in state]
    if captures:
        capture_all(loop, plan_capture(plan, loop, lambda done, total: None))
    for tensor in states:
        tensor.fill_(torch.nan)
    with patch.context() as watched:
        watch(watched, served, states)
        run(loop, served)
    assert all(tensor[0].isnan().all() for tensor in states), "the null slot is nobody's"
    return served


def watch(patch: pytest.MonkeyPatch, served: Served, states: list[Tensor]) -> None:
    replay, pieces = PassGraphs.replay, ForwardPieces.forward

    def replayed(
        graphs: PassGraphs, batch: LocalBatch, plan: Any, future: Any, place: Place
    ) -> PassOutput:
        before = [bits(tensor).clone() for tensor in states]
        output = replay(graphs, batch, plan, future, place)
        own, fresh = set(batch.states.slots.tolist()), bool(batch.states.is_fresh.any())
        for tensor, old in zip(states, before, strict=True):
            for slot in {*range(len(old))} - own:
                assert torch.equal(bits(tensor)[slot], old[slot]), f"slot {slot} in {place}"
        served.replays.append((place.pass_kind, batch.num_requests, fresh))
        return output

    def in_pieces(own: ForwardPieces, *arguments: Any) -> Any:
        served.in_pieces += 1
        return pieces(own, *arguments)

    patch.setattr(PassGraphs, "replay", replayed)
    patch.setattr(ForwardPieces, "forward", in_pieces)


def run(loop: StepLoop, served: Served) -> None:
    numbers = iter(range(NUM_REQUESTS))
    pending, ended = dict(ARRIVALS), set[int]()

    def take() -> Inbox:
        new = []
        for length, count in pending.pop(loop.coordinator.step_id, ()):
            number = next(numbers)
            params = SamplingParams(
                max_tokens=count, temperature=0.0, ignore_eos=True, return_routed_experts=True
            )
            prompt = tuple((7 * number + 3 * n) % 199 for n in range(length))
            new.append(RankRequest(number, prompt, params, 0, frozenset()))
        return Inbox(new, stop=len(ended) == NUM_REQUESTS)

    def deliver(updates: list[RequestUpdate]) -> None:
        for one in updates:
            served.tokens.setdefault(one.request_id, []).extend(one.token_ids)
            if one.routed_experts is not None:
                served.experts.setdefault(one.request_id, []).extend(one.routed_experts.tolist())
            ended.update([one.request_id] if one.finish_reason else [])

    loop.run(take, deliver)


def check_served(served: Served, num_drafts: int) -> None:
    """Check that graphs and pieces took part, and that every request has its tokens."""
    counts = [count for arrivals in ARRIVALS.values() for _, count in arrivals]
    assert [len(served.tokens[number]) for number in range(NUM_REQUESTS)] == counts
    lengths = [length for arrivals in ARRIVALS.values() for length, _ in arrivals]
    for number, (length, count) in enumerate(zip(lengths, counts)):
        assert len(served.experts[number]) == length + count - 1, "all but the last token's"
    kinds = {kind for kind, _, _ in served.replays}
    assert kinds >= ({Pass.TARGET, Pass.DRAFT_EXTEND} if num_drafts else {Pass.TARGET})
    assert {3, 1} <= {count for _, count, _ in served.replays}, "there are null sequences"
    assert served.in_pieces > 2, "prompts and chunks go through pieces"
    assert num_drafts or any(fresh for _, _, fresh in served.replays), "a prompt of one token"

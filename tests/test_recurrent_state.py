"""A model with recurrent layers, served: every token is that of its sequence computed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from collectives.in_process import InProcessGroup
from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry
from dp_runtime.core.recurrent_metadata import RecurrentMetadata
from dp_runtime.core.request import FinishReason
from dp_runtime.errors import RequestFailed
from dp_runtime.models.causal_lm import PassInputs, PassPlan
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.parallel.row_exchange import PaddedExchange
from dp_runtime.startup.build_rank import load_rank
from dp_runtime.startup.rank_plan import plan_rank
from tests.dp_runtime.hybrid import hybrid_checkpoint
from tests.dp_runtime.paged import CPU, PLACE, paged_batch
from tests.serving import check_pages_free, joined_ranks

WAIT_S = 60.0
PAGE_SIZE = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        yield hybrid_checkpoint(tmp_path_factory.mktemp("hybrid"), patch)


class Alone:
    """The model on one rank, which computes a sequence from its first token for every next one."""

    def __init__(self, path: Path) -> None:
        config = EngineConfig(str(path), max_model_len=256, page_size=PAGE_SIZE, device="cpu")
        self.plan = plan_rank(config, 0, "cpu")
        self.model = load_rank(config, self.plan, lambda count: None).models.target
        self.exchange = InProcessGroup(1, WAIT_S).collective(0)
        self.known: dict[tuple[int, ...], list[int]] = {}  # by prompt, with what follows

    @torch.inference_mode()
    def next_token(self, tokens: Sequence[int]) -> int:
        count = len(tokens)
        pages = np.arange(1, 1 + -(-count // PAGE_SIZE), dtype=np.int32)[None]
        batch = paged_batch([(count, count)], pages, PAGE_SIZE, tokens)
        geometry = PageGeometry(self.plan.pages.num_pages, PAGE_SIZE)
        attention = AttentionMetadata.build(batch, geometry, PLACE, CPU)
        recurrent = RecurrentMetadata(
            torch.tensor([0, count], dtype=torch.int32), batch.query_lens,
            torch.tensor([1]), torch.tensor([True]),
        )  # fmt: skip
        inputs = PassInputs(torch.tensor(tokens), torch.arange(count))
        plan = PassPlan(self.model.backend.plan(attention), recurrent)
        padding = PaddingPlan.for_mode(PaddingMode.MAX_LEN, (count,))
        hidden = self.model.forward(inputs, plan, PaddedExchange(padding, self.exchange, False))
        return int(self.model.logits(hidden.last[-1:]).argmax())

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        known = self.known.setdefault(tuple(prompt), [*prompt])
        end = len(prompt) + count
        while len(known) < end:
            known.append(self.next_token(known))
        return known[len(prompt) : end]


@pytest.fixture(scope="module")
def alone(model: Path) -> Alone:
    return Alone(model)


def load(seed: int, count: int = 10) -> list[tuple[list[int], int]]:
    """Prompts of 1 to 40 tokens, the short ones often, and how many tokens each is to get."""
    draw = random.Random(seed)
    lengths = [draw.choice((1, 1, 2, 3, 4, 5, draw.randrange(6, 41))) for _ in range(count)]
    return [([draw.randrange(3, 190) for _ in range(n)], draw.randrange(4, 16)) for n in lengths]


@contextmanager
def dirty_engine(model: Path, **fields: Any) -> Iterator[Engine]:
    """An engine whose states hold what is no request's, NaN in every other slot."""
    defaults: dict[str, Any] = {
        "max_model_len": 128, "max_num_requests": 3, "max_num_tokens": 16, "page_size": PAGE_SIZE,
        "launcher": "thread", "device": "cpu", "poison_padding": True,
    }  # fmt: skip
    with Engine(EngineConfig(str(model), **defaults | fields)) as engine:
        for rank in joined_ranks(engine):
            for tensor in (one for state in rank.connected.loaded.rank.states for one in state):
                tensor[::2], tensor[1::2] = torch.nan, 1e4
        yield engine


def check(alone: Alone, engine: Engine, items: Sequence[tuple[list[int], int]]) -> None:
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count) for _, count in items
    ]
    handles = [engine.submit(prompt, own) for (prompt, _), own in zip(items, params, strict=True)]
    for handle, (prompt, count) in zip(handles, items, strict=True):
        assert list(handle.result(WAIT_S).token_ids) == alone.greedy(prompt, count)
    check_pages_free(engine)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("dp_size", "max_num_tokens"), [(1, 3), (1, 16), (2, 4), (3, 64)])
def test_tokens_are_those_of_a_sequence_alone(
    model: Path, alone: Alone, dp_size: int, max_num_tokens: int, overlap: bool
) -> None:
    """Chunks of all lengths on dirty slots, idle ranks, more requests than slots."""
    fields = {"dp_size": dp_size, "max_num_tokens": max_num_tokens, "overlap": overlap}
    with dirty_engine(model, **fields) as engine:
        for seed in (dp_size, 7):
            check(alone, engine, load(seed))


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_and_aborted_requests_leave_nothing_behind(
    model: Path, alone: Alone, overlap: bool
) -> None:
    fields = {"max_num_requests": 6, "num_pages": 9, "page_size": 4, "max_model_len": 32}
    endless = SamplingParams(max_tokens=10**6, temperature=0.7, ignore_eos=True)
    items = [([5 + index] * (1 + index), 12) for index in range(8)]
    with dirty_engine(model, overlap=overlap, **fields) as engine:
        doomed = [engine.submit([9, 9, 9], endless) for _ in range(4)]
        next(iter(doomed[0]))
        for handle in doomed:
            handle.abort()
        check(alone, engine, items)
        assert {handle.result(WAIT_S).finish_reason for handle in doomed} <= {
            FinishReason.ABORT, FinishReason.LENGTH,
        }  # fmt: skip
        assert engine.report().preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", ["raise", "oom"])
def test_after_a_recovery_states_are_those_of_the_committed_tokens(
    model: Path, alone: Alone, kind: str, overlap: bool
) -> None:
    """A survivor's step wrote its states before the other rank failed in it."""
    inject = ";".join(f"rank=1,step={step},kind={kind},epoch={e}" for e, step in enumerate((6, 4)))
    fields = {"dp_size": 2, "overlap": overlap, "inject": inject}
    with dirty_engine(model, **fields) as engine:
        # The last is alone on its rank at its end. So many are there that rank 1 still has prompts
        # to run, one at a time, when its second fault is due.
        items = [*load(3, 20), ([7, 8, 9], 40)]
        handles = []
        for index, (prompt, count) in enumerate(items):
            own = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count)
            handles.append(engine.submit(prompt, own, dp_rank=(index + 1) % 2))
        failed = 0
        for handle, (prompt, count) in zip(handles, items, strict=True):
            try:
                tokens = list(handle.result(WAIT_S).token_ids)
            except RequestFailed:
                failed += 1
            else:
                assert tokens == alone.greedy(prompt, count)
        assert failed in ((1, 2) if kind == "oom" else (0,)), "who alone prefilled in the step"
        assert {rank.epoch for rank in engine.health()} == {2}
        check_pages_free(engine)


def test_the_null_slot_and_other_slots_are_left_alone(model: Path) -> None:
    with dirty_engine(model, max_num_requests=4) as engine:
        (rank,) = joined_ranks(engine)
        states = [one for state in rank.connected.loaded.rank.states for one in state]
        before = [tensor.clone() for tensor in states]
        engine.generate([[5, 6, 7]], SamplingParams(max_tokens=5, temperature=0.0))
        for tensor, old in zip(states, before, strict=True):
            same = [torch.equal(now, then) for now, then in zip(bits(tensor), bits(old))]
            assert same == [True, False, *[True] * (len(same) - 2)], (
                "no state is left of so few tokens"
            )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, of which those of a NaN are equal to themselves: [slots, bytes]."""
    return tensor.flatten(1).view(torch.uint8)

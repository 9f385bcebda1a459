"""How speculating requests are sampled and end: as without, inside of accepted drafts too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from dp_runtime import Engine, RequestOutput, SamplingParams
from dp_runtime.core.request import FinishReason
from tests.dp_runtime.speculative_ranks import Watch
from tests.draws import check_drawn
from tests.product_cases import random_prompt
from tests.reference import Reference
from tests.serving import check_pages_free, loops_of
from tests.speculative_cases import TRAINED, Drafted, engine_of
from tests.test_sampling_end_to_end import PARAMS, PROMPTS

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=24)
TEXTS = [
    (TRAINED.model.parent / "held_out.txt").read_text()[at : at + 120] for at in range(0, 3600, 600)
]
DraftedOf = Callable[[str], Drafted]
Load = Sequence[tuple[Any, SamplingParams]]  # prompt, parameters


def unzip(load: Load) -> tuple[list[Any], list[SamplingParams]]:
    return [prompt for prompt, _ in load], [params for _, params in load]


def check_same(
    drafted: Drafted, load: Load, num_steps: int, dp_size: int = 2, **fields: Any
) -> tuple[list[RequestOutput], int]:
    """Serve with drafts what has to be as without.

    Returns the outputs, and how many ended inside of what a verification gave.
    """
    with engine_of(drafted, 0, dp_size, **fields) as engine:
        plain = engine.generate(*unzip(load))
    with engine_of(drafted, num_steps, dp_size, **fields) as engine:
        watches = [Watch(loop) for loop in loops_of(engine)]
        outputs = engine.generate(*unzip(load))
        check_pages_free(engine)
    for output, due in zip(outputs, plain):
        check_output(output, due)
    verified = {key: some for watch in watches for key, some in watch.verified.items()}
    ends = {
        number: len(output.prompt_token_ids) + len(output.token_ids)
        for number, output in enumerate(outputs)
    }
    last = [(ends[number], some[-1]) for number, some in verified.items()]
    return outputs, sum(end < one.num_known + one.num_accepted + 1 for end, one in last)


def check_output(output: RequestOutput, due: RequestOutput) -> None:
    assert output.token_ids == due.token_ids
    assert output.text == due.text
    assert (output.finish_reason, output.stop_reason) == (due.finish_reason, due.stop_reason)
    for name in ("logprobs", "prompt_logprobs"):
        entries, wanted = getattr(output, name), getattr(due, name)
        assert (entries is None) == (wanted is None)
        for entry, other in zip(entries or (), wanted or (), strict=True):
            assert entry.token_id == other.token_id
            found, values = ([one.logprob, *(v for _, v in one.top)] for one in (entry, other))
            torch.testing.assert_close(found, values, atol=1e-4, rtol=0)


SAMPLED: dict[str, dict[str, Any]] = {
    "dp4": {"num_steps": 3, "dp_size": 4, "poison_padding": True, "padding": "ragged"},
    "adaptive": {"num_steps": 5, "speculative_adaptive": True, "moe_sharding": "tp"},
    "preempted": {"num_steps": 7, "num_pages": 10, "max_num_tokens": 64},
}


@pytest.mark.parametrize(
    ("checkpoint", "kind"),
    [
        ("eagle3_mixtral", "adaptive"),
        ("agreeing", "preempted"),
        pytest.param("agreeing", "dp4", marks=pytest.mark.slow),
    ],
)
def test_sampled_tokens(
    checkpoint: str, kind: str, drafted_of: DraftedOf, oracle_of: Callable[[str], Reference]
) -> None:
    """Every filter, penalty and bias, seeded; random drafts, and some that are accepted."""
    load = list(zip(PROMPTS, PARAMS))
    fields = dict(SAMPLED[kind])
    adaptive = fields.pop("speculative_adaptive", False)
    drafted, num_steps = drafted_of(checkpoint), fields.pop("num_steps")
    with engine_of(drafted, 0, 1) as engine:
        plain = engine.generate(*unzip(load))
    with engine_of(drafted, num_steps, speculative_adaptive=adaptive, **fields) as engine:
        outputs = engine.generate(*unzip(load))
        check_pages_free(engine)
        report = engine.report()
    check_drawn(oracle_of(checkpoint), outputs, PARAMS)
    same = sum(output.token_ids == due.token_ids for output, due in zip(outputs, plain))
    assert same >= len(load) - 1, "more than one near-tie is no chance"
    assert (report.preemptions > 0) == (kind == "preempted")
    assert report.drafts_accepted > 10 or checkpoint != "agreeing"


@pytest.mark.parametrize("overlap", [False, True])
def test_max_tokens(overlap: bool, drafted_of: DraftedOf) -> None:
    load = [(PROMPTS[n], replace(GREEDY, max_tokens=1 + n)) for n in range(10)]
    outputs, inside = check_same(drafted_of("agreeing"), load, 3, overlap=overlap)
    assert [len(output.token_ids) for output in outputs] == [*range(1, 11)]
    assert inside > 0


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_stop_tokens(overlap: bool, drafted_of: DraftedOf) -> None:
    with engine_of(drafted_of("agreeing"), 0) as engine:
        plain = engine.generate(PROMPTS[:8], GREEDY)
    ends = [output.token_ids[3 + 2 * number] for number, output in enumerate(plain)]
    # Steps do not run ahead where log probabilities are asked for.
    logprobs: dict[str, Any] = {} if overlap else {"logprobs": 2}
    load = [(p, replace(GREEDY, stop_token_ids=(e,), **logprobs)) for p, e in zip(PROMPTS, ends)]
    outputs, inside = check_same(drafted_of("agreeing"), load, 5, 3, overlap=overlap)
    assert {output.finish_reason for output in outputs} == {FinishReason.STOP}
    assert all(output.token_ids[-1] == output.stop_reason for output in outputs)
    assert inside > 0


@pytest.mark.parametrize(("num_steps", "max_model_len"), [(3, 65), (7, 61)])
def test_max_model_len(num_steps: int, max_model_len: int, drafted_of: DraftedOf) -> None:
    """Drafts reach behind the longest sequence, whose pages end there or later."""
    lengths = (55, 50, 57, 41, max_model_len - 1, max_model_len - 2)
    load = [(random_prompt(n, "full"), replace(GREEDY, max_tokens=10**9)) for n in lengths]
    fields = {"max_model_len": max_model_len, "page_size": 4, "overlap": num_steps == 3}
    outputs, inside = check_same(drafted_of("agreeing"), load, num_steps, **fields)
    for output in outputs:
        assert len(output.prompt_token_ids) + len(output.token_ids) == max_model_len
    assert inside > 0


def test_stop_strings_and_streams() -> None:
    """Text of the trained model: words come several at a time, and end where they ended."""
    stops = (["the"], [" a", "\n"], ["e"], ["."], ["zzz"], ["in ", "or"])
    load = [(text, replace(GREEDY, stop=stop)) for text, stop in zip(TEXTS, stops)]
    outputs, inside = check_same(TRAINED, load, 5)
    assert FinishReason.STOP in {output.finish_reason for output in outputs}
    assert inside > 0
    with engine_of(TRAINED, 5) as engine:
        deltas = list(engine.stream(TEXTS[4], load[4][1]))
    assert "".join(delta.text for delta in deltas) == outputs[4].text
    assert sum((delta.token_ids for delta in deltas), ()) == outputs[4].token_ids
    assert max(len(delta.token_ids) for delta in deltas) > 1
    assert deltas[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("overlap", [False, True])
def test_aborts_leave_others_unchanged(overlap: bool, drafted_of: DraftedOf) -> None:
    """Some end after a few tokens, among verifications, while few pages are fought for."""
    drafted = drafted_of("agreeing")
    with engine_of(drafted, 0) as engine:
        plain = engine.generate(PROMPTS[:6], GREEDY)
    endless = replace(GREEDY, max_tokens=10**6)
    with engine_of(drafted, 5, num_pages=10, max_num_tokens=64, overlap=overlap) as engine:
        doomed = [engine.submit(PROMPTS[i], endless, i % 2) for i in range(4)]
        kept = [engine.submit(PROMPTS[i], GREEDY, i % 2) for i in range(6)]
        for handle in doomed:
            if not handle.done:
                next(iter(handle))
            handle.abort()
        outputs = [handle.result(60) for handle in kept]
        ended = [handle.result(60) for handle in doomed]
        check_pages_free(engine)
        assert no_page_is_lost(engine)
    for output, due in zip(outputs, plain):
        check_output(output, due)
    assert FinishReason.ABORT in {output.finish_reason for output in ended}


def no_page_is_lost(engine: Engine) -> bool:
    for loop in loops_of(engine):
        loop.scheduler.check()
    return True

"""Serving with drafts against transformers and against serving without, over ranks as threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest

from dp_runtime import Engine, RequestOutput, SamplingParams
from dp_runtime.core.step_program import Program
from dp_runtime.metrics.chrome_trace import chrome_trace
from dp_runtime.speculative.adaptive_length import AdaptiveLength
from tests.dp_runtime.speculative_ranks import Verified, Watch
from tests.product_cases import covering_rows, every, random_prompt
from tests.reference import Reference, check_greedy
from tests.serving import check_load, check_pages_free, loops_of
from tests.speculative_cases import (
    DRAFTED,
    SPECULATIVE_DIMENSIONS,
    SPECULATIVE_GROUPS,
    STEPS,
    TRAINED,
    Drafted,
    SpeculativeCase,
    engine_of,
)
from tests.traces import check_trace

DraftedOf = Callable[[str], Drafted]
CASES = [
    SpeculativeCase(**row) for row in covering_rows(SPECULATIVE_DIMENSIONS, SPECULATIVE_GROUPS)
]
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=24)
PROMPTS = [random_prompt(length, "drafted") for length in (1, 5, 9, 20, 33, 50, 3, 17)]


def check_case(case: SpeculativeCase, drafted: Drafted, reference: Reference) -> None:
    with Engine(case.config_of(drafted)) as engine:
        check_load(engine, reference, case.items, case.extra)
        report = engine.report()
        assert report.verifications > 0
        if case.preempts and case.max_num_tokens == 2048:  # both leaders hold pages at once
            assert report.preemptions > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_output_is_that_of_the_target(
    case: SpeculativeCase, drafted_of: DraftedOf, oracle_of: Callable[[str], Reference]
) -> None:
    check_case(case, drafted_of(case.checkpoint), oracle_of(case.checkpoint))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("checkpoint", DRAFTED)
def test_full_product(
    checkpoint: str,
    num_steps: int,
    drafted_of: DraftedOf,
    oracle_of: Callable[[str], Reference],
) -> None:
    """Every draft model with every number of steps, and all pairs of the other dimensions."""
    fixed: dict[str, Any] = {"checkpoint": checkpoint, "num_steps": num_steps}
    others = {n: choices for n, choices in SPECULATIVE_DIMENSIONS.items() if n not in fixed}
    for row in covering_rows(others, every(2, tuple(others)), num_steps):
        case = SpeculativeCase(**fixed, **row)
        print(case)  # the last one printed is the one that failed
        check_case(case, drafted_of(checkpoint), oracle_of(checkpoint))


def test_a_draft_of_the_first_tokens_writes_the_same_text(drafted_of: DraftedOf) -> None:
    """Only chains end earlier: where the target's next token is none of them."""
    drafted, found = drafted_of("agreeing"), list[list[tuple[int, ...]]]()
    accepted = []
    for num_steps, vocab in ((0, None), (3, None), (3, 70)):
        with engine_of(drafted, num_steps, speculative_draft_vocab=vocab) as engine:
            found.append([one.token_ids for one in engine.generate(PROMPTS[:4], GREEDY)])
            if num_steps:
                accepted.append(engine.report().tokens_per_verification)
                for loop in loops_of(engine):
                    assert loop.runner.drafting is not None
                    assert int(loop.runner.drafting.state.first_draft.max()) < (vocab or 1000)
    assert found == [found[0]] * 3
    assert accepted[0] > accepted[1] > 1


@pytest.mark.parametrize("num_steps", [3])
def test_a_trained_draft_writes_the_same_text_in_fewer_steps(num_steps: int) -> None:
    text = (TRAINED.model.parent / "held_out.txt").read_text()
    prompts = [text[at : at + 80 + at % 50] for at in range(0, 3000, 600)]
    with engine_of(TRAINED, 0) as engine:
        plain = engine.generate(prompts, GREEDY)
    with engine_of(TRAINED, num_steps) as engine:
        outputs = engine.generate(prompts, GREEDY)
        report = engine.report()
        check_pages_free(engine)
    assert [one.token_ids for one in outputs] == [one.token_ids for one in plain]
    assert [one.text for one in outputs] == [one.text for one in plain]
    check_greedy(Reference(TRAINED.model), outputs, [one.prompt_token_ids for one in outputs])
    assert report.tokens_per_verification > 1.4


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local"])
def test_ranks_in_processes_of_their_own(launcher: str, drafted_of: DraftedOf) -> None:
    drafted, fields = drafted_of("agreeing"), {"launcher": launcher, "torch_threads": 1}
    with engine_of(drafted, 0) as engine:
        plain = engine.generate(PROMPTS, GREEDY)
    with engine_of(drafted, 3, 3, speculative_adaptive=True, **fields) as engine:
        outputs = engine.generate(PROMPTS, GREEDY)
        assert engine.report().drafts_accepted > 0
        check_pages_free(engine)
    assert [one.token_ids for one in outputs] == [one.token_ids for one in plain]


def verified_of(watches: list[Watch]) -> dict[int, list[Verified]]:
    """By request, in the order of their ids."""
    return dict(sorted(chain.from_iterable(watch.verified.items() for watch in watches)))


@pytest.mark.parametrize("adaptive", [False, True])
def test_report_and_trace_count_what_was_verified(adaptive: bool, drafted_of: DraftedOf) -> None:
    params = [replace(GREEDY, max_tokens=32 + index) for index in range(len(PROMPTS))]
    with engine_of(drafted_of("agreeing"), 4, 3, speculative_adaptive=adaptive) as engine:
        watches = [Watch(loop) for loop in loops_of(engine)]
        if adaptive:
            for loop in loops_of(engine):
                loop.coordinator.policy = AdaptiveLength(4, cost=0.01)  # more drafts pay soon
        outputs = engine.generate(PROMPTS, params)
        check_pages_free(engine)
        report, trace, health = engine.report(), engine.step_trace(), engine.health()
    verified = verified_of(watches)
    for output, ones in zip(outputs, verified.values(), strict=True):
        check_emitted(output, ones)
    ones = [one for some in verified.values() for one in some]
    accepted = Counter(one.num_accepted for one in ones)
    longest = max(len(one.drafts) for one in ones)
    assert report.accepted_histogram == tuple(accepted[length] for length in range(longest + 1))
    assert report.verifications == len(ones)
    assert report.drafts_proposed == sum(len(one.drafts) for one in ones)
    assert report.drafts_accepted == sum(one.num_accepted for one in ones)
    assert report.tokens_per_verification == 1 + report.drafts_accepted / report.verifications
    assert report.output_tokens == sum(len(output.token_ids) for output in outputs)
    assert f"tokens per verification {report.tokens_per_verification:.3f}" in str(report)
    assert {*report.pass_s} == {"draft", "target", "draft_extend"}
    for step in trace:
        assert [each.pass_kind for each in step.passes] == [
            *Program.speculative(step.num_drafts).passes
        ]
        assert len(step.accepted) == step.num_drafts + 1
    assert sum(sum(step.accepted) for step in trace) == report.verifications
    lengths = [
        [step.num_drafts for step in trace if step.dp_rank == rank]
        for rank in range(report.dp_size)
    ]
    assert lengths[0] == lengths[1] == lengths[2]
    assert {*lengths[0]} > {1} if adaptive else {*lengths[0]} == {4}
    events = check_trace("".join(chrome_trace(trace, health)))
    found = [event["args"] for event in events if event["name"] == "commit"]
    assert [args["verifications by accepted drafts"] for args in found] == [
        list(step.accepted) for step in trace
    ]


def check_emitted(output: RequestOutput, verified: list[Verified]) -> None:
    """The prompt gave one token, each verification what it accepted and one more, to the end."""
    known = len(output.prompt_token_ids) + 1
    for one in verified:
        assert one.num_known == known
        known += one.num_accepted + 1
    end = len(output.prompt_token_ids) + len(output.token_ids)
    assert verified[-1].num_known < end <= known

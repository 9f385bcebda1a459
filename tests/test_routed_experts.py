"""The experts that are returned of every token, against transformers, over ranks as threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams
from dp_runtime.core.request import FinishReason
from dp_runtime.core.structured_outputs import StructuredOutputs
from tests.checkpoints import tiny_checkpoint
from tests.product_cases import Case, random_prompt
from tests.reference import Reference
from tests.routed_cases import check_routed
from tests.serving import check_pages_free
from tests.speculative_cases import TRAINED, Drafted, SpeculativeCase

ROUTED = SamplingParams(temperature=0.0, ignore_eos=True, return_routed_experts=True)


def slow(case: object) -> Any:
    return pytest.param(case, marks=pytest.mark.slow)


CASES = [
    Case(load="uneven", few_pages=True, max_num_tokens=16, overlap=True, page_size=4),
    slow(Case("sparse_step", 2, "tp", "ragged", load="mixed", max_num_tokens=64)),
    Case("dense", 3, "ep", "auto", True, True, "idle_ranks", 16, True, 4),
    slow(Case("mixtral", 4, "tp", "max_len", True, True, "uneven", 64, True, 16)),
    slow(Case("experts7", 4, "ep", "ragged", False, False, "one", 2048)),
]
SPECULATIVE_CASES = [
    SpeculativeCase("agreeing", 2, "ep", "max_len", True, True, "uneven", 32, True, 4, num_steps=3),
    slow(SpeculativeCase("agreeing", 1, overlap=False, load="mixed", num_steps=2, adaptive=True)),
    SpeculativeCase("hybrid", 3, "tp", "ragged", overlap=True, load="even", num_steps=4),
    slow(SpeculativeCase("eagle3_mixtral", 4, overlap=True, load="idle_ranks", num_steps=1)),
]


def serve(engine: Engine, case: Case, params: SamplingParams = ROUTED) -> list[RequestOutput]:
    items = case.items
    each = [replace(params, max_tokens=item.max_tokens) for item in items]
    ranks = [item.dp_rank for item in items]
    return engine.generate([item.prompt for item in items], each, ranks)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_token_has_the_choices_of_an_independent_forward(
    case: Case, reference_of: Callable[[str], Reference]
) -> None:
    reference = reference_of(case.checkpoint)
    with Engine(case.config(str(reference.path), enable_return_routed_experts=True)) as engine:
        check_routed(reference, serve(engine, case))
        if case.preempts:
            assert engine.report().preemptions > 0
        check_pages_free(engine)


@pytest.mark.parametrize("case", SPECULATIVE_CASES, ids=str)
def test_drafts_that_are_rejected_are_not_told(
    case: SpeculativeCase,
    drafted_of: Callable[[str], Drafted],
    oracle_of: Callable[[str], Reference],
) -> None:
    drafted = drafted_of(case.checkpoint)
    with Engine(case.config_of(drafted, enable_return_routed_experts=True)) as engine:
        check_routed(oracle_of(case.checkpoint), serve(engine, case))
        report = engine.report()
        assert report.drafts_accepted < report.drafts_proposed
        assert report.drafts_accepted > 0 or case.checkpoint == "eagle3_mixtral"  # a random head


def test_ends_within_a_step_and_those_who_do_not_ask() -> None:
    """Stop strings, stop tokens and aborts, beside requests that have no use for experts."""
    model, reference = TRAINED.model, Reference(TRAINED.model)
    text = (model.parent / "held_out.txt").read_text()
    config = EngineConfig(
        str(model), dp_size=2, launcher="thread", speculative_num_steps=4, max_num_tokens=128,
        max_num_requests=8, enable_return_routed_experts=True,
    )  # fmt: skip
    with Engine(config) as engine:
        long = replace(ROUTED, max_tokens=40)
        plain = engine.generate([text[:60]], [replace(long, return_routed_experts=False)])[0]
        assert plain.routed_experts is None
        stops = [plain.text[9:12], plain.text[3:5]]
        outputs = engine.generate(
            [text[:60]] * 3,
            [replace(long, stop=stops[:1]), replace(long, stop=stops[1:]),
             replace(long, stop_token_ids=plain.token_ids[7:8])],
        )  # fmt: skip
        assert {one.finish_reason for one in outputs} == {FinishReason.STOP}
        endless = engine.submit(text[:100], replace(long, max_tokens=1000))
        next(iter(endless))
        form = StructuredOutputs(regex="[a-z ]{20,30}")
        beside = engine.generate(
            [text[:30], text[5:50], text[9:40]],
            [plain_params(), long, replace(long, structured_outputs=form)],
        )
        endless.abort()
        check_routed(reference, [*outputs, *beside[1:], endless.result(60)])
        assert beside[0].routed_experts is None


def plain_params() -> SamplingParams:
    return SamplingParams(temperature=0.9, seed=5, max_tokens=20, logprobs=2, prompt_logprobs=1)


def test_recoveries_and_moves_tell_nothing_twice(reference_of: Callable[[str], Reference]) -> None:
    """A rank fails in the middle of prompts and outputs; others leave and come."""
    reference = reference_of("qwen")
    config = EngineConfig(
        str(reference.path), dp_size=3, launcher="thread", max_num_tokens=16, max_num_requests=4,
        max_model_len=128, page_size=8, overlap=True, enable_return_routed_experts=True,
        inject="rank=1,step=3,kind=raise;rank=2,step=9,kind=raise,epoch=1",
    )  # fmt: skip
    prompts = [random_prompt(length, "moved") for length in (50, 3, 33, 9, 20, 1)]
    with Engine(config) as engine:
        handles = [engine.submit(prompt, replace(ROUTED, max_tokens=30)) for prompt in prompts]
        check_routed(reference, [handle.result(60) for handle in handles])
        assert engine.health()[0].epoch == 2
        handles = [engine.submit(prompt, replace(ROUTED, max_tokens=60)) for prompt in prompts]
        next(iter(handles[0]))
        engine.drain(1)
        engine.resize(2)
        check_routed(reference, [handle.result(60) for handle in handles])


def test_a_prompt_that_is_cached_is_computed_for_who_asks(
    reference_of: Callable[[str], Reference],
) -> None:
    reference, prompts = reference_of("qwen"), [random_prompt(length, "hit") for length in (30, 9)]
    config = EngineConfig(
        str(reference.path), launcher="thread", page_size=4, enable_return_routed_experts=True
    )
    asked = replace(ROUTED, max_tokens=6)
    with Engine(config) as engine:
        plain = replace(asked, return_routed_experts=False)
        engine.generate(prompts, plain)
        outputs = engine.generate(prompts, asked)
        assert [one.num_cached_tokens for one in engine.generate(prompts, plain)] == [28, 8]
    assert [one.num_cached_tokens for one in outputs] == [0, 0]
    check_routed(reference, outputs)


def test_it_is_refused_where_nothing_is_kept(tmp_path: Path) -> None:
    path = str(tiny_checkpoint(tmp_path / "dense", mlp_only_layers=[0, 1]))
    config = EngineConfig(path, launcher="thread", enable_return_routed_experts=True)
    with pytest.raises(Exception, match="enable_return_routed_experts: True is not allowed; false"):
        Engine(config)
    others = replace(config, enable_return_routed_experts=False)
    refused = pytest.raises(ValueError, match="return_routed_experts: True is not allowed; false")
    with Engine(others) as engine, refused:
        engine.generate([[1, 2]], ROUTED)


def test_many_experts_are_wider_numbers(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "wide", num_experts=300, num_hidden_layers=1)
    config = EngineConfig(str(path), launcher="thread", enable_return_routed_experts=True)
    with Engine(config) as engine:
        (output,) = engine.generate([range(1, 60)], replace(ROUTED, max_tokens=2))
    assert output.routed_experts is not None
    assert output.routed_experts.dtype == np.int16
    assert output.routed_experts.shape == (60, 1, 2)
    assert output.routed_experts.max() > 255

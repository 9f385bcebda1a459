"""The soak of examples/soak.py at a size for CPU ranks, and that it sees what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dp_runtime import EngineConfig, FinishReason, RequestOutput
from dp_runtime.metrics.report import Report
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.metrics.totals import Totals
from dp_runtime.metrics.trace import PassTrace, StepTrace
from examples.soak import soak
from examples.soak_checks import Served, find_faults, longest_quiet
from examples.soak_load import LoadShape, SoakRequest, make_load, scarce_pages
from tests.reference import Reference

SMALL = LoadShape(
    num_requests=60, in_flight=24, prompt_len=12, max_prompt_len=60, output_len=14,
    max_output_len=60,
)  # fmt: skip


@pytest.mark.parametrize("padding", [pytest.param("max_len", marks=pytest.mark.slow), "ragged"])
def test_a_small_soak_ends_without_a_fault(
    padding: str, reference_of: Callable[[str], Reference]
) -> None:
    config = EngineConfig(
        str(reference_of("qwen").path), dp_size=4, launcher="thread", device="cpu", page_size=8,
        max_num_tokens=64, padding=padding, overlap=padding == "ragged", poison_padding=True,
    )  # fmt: skip
    outcome = soak(config, SMALL, plenty=0.6, repeat=4, timeout_s=60)
    assert not outcome.faults
    assert outcome.report.requests == 60


def test_a_load_is_heavy_tailed_uneven_and_always_the_same() -> None:
    shape = LoadShape()
    load, again = (make_load(shape, 1000, 8) for _ in range(2))
    outputs = np.array([request.params.max_tokens for request in load])
    prompts = np.array([len(request.prompt.token_ids) for request in load])
    assert [r.prompt.token_ids for r in load] == [r.prompt.token_ids for r in again]
    assert (len(load), prompts.min() >= 1, prompts.max(), outputs.max()) == (1730, True, 1024, 512)
    assert abs(np.median(prompts) - 128) < 12
    assert abs(np.median(outputs) - 48) < 5
    assert outputs.mean() > 1.5 * np.median(outputs)
    pinned = [sum(request.dp_rank == rank for request in load) for rank in range(4)]
    assert pinned == sorted(pinned, reverse=True)
    assert pinned[0] > 3 * pinned[3] > 0
    assert sum(request.dp_rank is None for request in load) > 700
    assert sum(request.prompt.prompt_embeds is not None for request in load) == 87
    assert scarce_pages(load, shape, 64, 0.6) < scarce_pages(load, shape, 64, 1.0)
    assert scarce_pages(load, shape, 64, 0.0) == 1 + 24


Outcome = tuple[Served, Report, list[RankHealth]]


def right_outcome(load: tuple[SoakRequest, ...]) -> Outcome:
    """What a soak without a fault would find."""
    served = Served(max_in_flight=24, quiet_steps=50)
    for request in load:
        doomed = request.index == SMALL.doomed
        tokens = tuple(range(3 if doomed else request.params.known_max_tokens))
        served.outputs[request.index] = RequestOutput(
            request_id=100 + request.index, prompt_token_ids=tuple(request.prompt.token_ids),
            text="", token_ids=tokens, stop_reason=None, dp_rank=request.dp_rank or 0,
            finish_reason=FinishReason.ABORT if doomed else FinishReason.LENGTH,
        )  # fmt: skip
        served.streamed[request.index] = tokens
        served.sent_to[request.index] = request.dp_rank
    made = sum(len(tokens) for tokens in served.streamed.values())
    ended = {FinishReason.LENGTH: len(load)}
    totals = [Totals(0, output_tokens=made, preemptions=2), Totals(1), Totals(2), Totals(3)]
    health = [RankHealth(r, RankState.IDLE, free_pages=9, num_pages=10) for r in range(4)]
    return served, Report.from_totals(totals, [RequestTotals(0, ended=ended)], 1.0), health


def faults_after(change: Callable[[Outcome], Outcome | None]) -> list[str]:
    load = make_load(SMALL, 199, 64)
    outcome = right_outcome(load)
    served, report, health = change(outcome) or outcome
    return find_faults(load, SMALL, served, report, health)


def change_output(index: int, **fields: Any) -> Callable[[Outcome], None]:
    def change(outcome: Outcome) -> None:
        outcome[0].outputs[index] = replace(outcome[0].outputs[index], **fields)

    return change


FAULTS: dict[str, Callable[[Outcome], Outcome | None]] = {
    "request 7 is lost": lambda o: o[0].outputs.__delitem__(7),
    "outputs of 59 requests": change_output(7, request_id=106),
    "59 ended": lambda o: (o[0], replace(o[1], requests=59), o[2]),
    "request 7 ended as length after 1 of": change_output(7, token_ids=(1,)),
    "request 7 ended as abort": change_output(7, finish_reason=FinishReason.ABORT),
    "it was aborted in mid-flight": change_output(30, finish_reason=FinishReason.LENGTH),
    "request 7 streamed 2 tokens": lambda o: o[0].streamed.update({7: (0, 0)}),
    "request 7 came back with another prompt": change_output(7, prompt_token_ids=(1,)),
    "request 7 ran on rank 2": lambda o: (change_output(7, dp_rank=2)(o), o[0].sent_to.update(
        {7: 1}))[1],
    "tokens were made": lambda o: (o[0], replace(o[1], output_tokens=5), o[2]),
    "rank 1: 8 of 9 pages are free": lambda o: (
        *o[:2], [replace(rank, free_pages=9 - (rank.dp_rank == 1)) for rank in o[2]],
    ),
    "23 requests in flight": lambda o: (replace(o[0], max_in_flight=23), *o[1:]),
    "49 steps in a row": lambda o: (replace(o[0], quiet_steps=49), *o[1:]),
    "1 preemptions": lambda o: (o[0], replace(o[1], preemptions=1), o[2]),
}  # fmt: skip


def test_a_right_outcome_has_no_fault() -> None:
    assert faults_after(lambda outcome: None) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str) -> None:
    found = faults_after(FAULTS[fault])
    assert any(fault in text for text in found), found


def test_quiet_steps_are_counted_in_a_row_and_only_beside_others() -> None:
    def step(number: int, rows: tuple[int, ...], rank: int) -> StepTrace:
        one = PassTrace("target", rows, rows, 0, 0.0, 0.0, "eager")
        return StepTrace(
            rank, number, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, passes=(one,), output_tokens=0,
            prompt_tokens=0,
        )  # fmt: skip

    rows = [(1, 0), (1, 0), (1, 1), (2, 0), (0, 0), (1, 0), (1, 0), (3, 0), (0, 5)]
    steps = [step(number, one, rank) for number, one in enumerate(rows) for rank in (0, 1)]
    assert longest_quiet(steps, 1) == 3
    assert longest_quiet(steps, 0) == 1


@pytest.mark.slow
def test_a_soak_with_faults_ends_without_one_of_its_own() -> None:
    command = [sys.executable, "-m", "examples.fault_soak", "--minutes", "0.4", "--every-s", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.stdout.endswith("no faults\n"), done.stdout + done.stderr
    assert done.returncode == 0

"""Scripts of requests for several ranks, and what each of those requests gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.step_program import MAX_DRAFTS
from dp_runtime.parallel.agreement import StepTotals
from tests.dp_runtime.speculative_ranks import Event, Served, SpeculativeRanks, Verified
from tests.product_cases import random_prompt

PAGE_SIZE = 4
MAX_REQUESTS = 6
MAX_TOKENS = 100
MORE = MAX_DRAFTS + 1  # tokens behind a request's end, to say what drafts there would agree with
PENALISED = {"temperature": 0.8, "top_k": 40, "frequency_penalty": 0.4, "repetition_penalty": 1.2}
# Prompt length, output tokens, and parameters other than greedy.
SHAPES: tuple[tuple[int, int, dict[str, float]], ...] = (
    (1, 9, {}), (5, 14, {}), (17, 6, {}), (30, 12, {}), (8, 1, {}), (4, 13, {}), (21, 2, {}),
    (6, 10, {"temperature": 0.9}), (12, 11, PENALISED), (3, 12, {"temperature": 0.5, "top_p": 0.8}),
)  # fmt: skip
LONGEST = max(prompt + outputs for prompt, outputs, _ in SHAPES)
MODEL_LEN = LONGEST + MORE


def request_of(shape: int, request_id: int, more: int = 0) -> RankRequest:
    """Request number `shape`; equal but for its id wherever it comes up."""
    prompt, outputs, fields = SHAPES[shape]
    params = SamplingParams(**dict[str, Any](temperature=0.0, ignore_eos=True) | fields)
    params = replace(params, max_tokens=outputs + more)
    return RankRequest(request_id, random_prompt(prompt, "phase"), params, 71 + shape, frozenset())


@dataclass(frozen=True)
class Alone:
    """What one request gets on a rank of its own, and beyond its end."""

    text: tuple[int, ...]  # prompt and outputs
    chains: dict[int, tuple[int, ...]]  # by known tokens, MAX_DRAFTS each

    def verified(self, num_known: int, num_steps: int) -> Verified:
        """The verification after so many known tokens."""
        drafts = self.chains[num_known][:num_steps]
        agree = [
            draft == token for draft, token in zip(drafts, self.text[num_known:], strict=False)
        ]
        return Verified(num_known, drafts, [*agree, False].index(False))


@dataclass(frozen=True)
class Script:
    """Requests that arrive on ranks at steps, some of which are aborted later."""

    dp_size: int
    num_steps: int
    arrivals: tuple[tuple[int, int, int, int | None], ...]  # step, rank, shape, steps to an abort
    num_requests: int = MAX_REQUESTS
    spare_tokens: int = MAX_TOKENS  # of a step's budget, beside the verifications
    num_pages: int | None = None
    overlap: bool = False

    @property
    def events(self) -> list[Event]:
        events = []
        for number, (step, rank, shape, abort) in enumerate(self.arrivals):
            request = request_of(shape, number)
            events.append(Event(step, rank, request))
            if abort is not None:
                events.append(Event(step + abort, rank, request, abort=True))
        return events

    @property
    def num_tokens(self) -> int:
        return min(MAX_TOKENS, self.num_requests * (1 + self.num_steps) + self.spare_tokens)

    def serve(self, ranks: SpeculativeRanks, **fields: Any) -> Served:
        return ranks.serve(
            self.events, self.num_steps, num_pages=self.num_pages, num_tokens=self.num_tokens,
            num_requests=self.num_requests, overlap=self.overlap, **fields,
        )  # fmt: skip

    def check(self, served: Served, alone: Sequence[Alone]) -> None:
        """Assert that text, drafts and accepted lengths are those of each request alone."""
        for number, (_, _, shape, abort) in enumerate(self.arrivals):
            prompt, count, _ = SHAPES[shape]
            text, outputs = alone[shape].text, served.outputs.get(number, ())
            assert outputs == text[prompt : prompt + len(outputs)], f"the text of {number}"
            assert len(outputs) == count or (abort is not None and len(outputs) < count)
            known = prompt + 1
            for one in served.verified.get(number, []):
                due = alone[shape].verified(one.num_known, len(one.drafts))
                assert one == due, f"request {number} of shape {shape}"
                # A request that was preempted has a token more when it decodes again.
                assert one.num_known == known or (served.begins_again and one.num_known > known)
                known = one.num_known + one.num_accepted + 1
            if len(outputs) == count and not served.begins_again:
                assert known >= prompt + count, "every token came from a verification or the prompt"


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    dp_size, num_steps = draw(st.integers(2, 4)), draw(st.integers(1, MAX_DRAFTS))
    plain = [shape for shape, (_, _, fields) in enumerate(SHAPES) if not fields]
    shapes = draw(st.sampled_from((plain, range(len(SHAPES)))))  # only plain ones may run ahead
    arrival = st.tuples(
        st.integers(0, 12), st.integers(0, dp_size - 1), st.sampled_from(shapes),
        st.one_of(st.none(), st.none(), st.integers(0, 8)),
    )  # fmt: skip
    fewest = 1 + -(-(LONGEST + num_steps) // PAGE_SIZE)
    return Script(
        dp_size,
        num_steps,
        tuple(draw(st.lists(arrival, min_size=1, max_size=8))),
        num_requests=draw(st.integers(1, MAX_REQUESTS)),
        spare_tokens=draw(st.integers(0, 30)),
        num_pages=draw(st.one_of(st.none(), st.integers(fewest, fewest + 6))),
        overlap=draw(st.booleans()),
    )


def cycle(totals: StepTotals) -> int:
    """Another number of drafts in every step, by what all ranks know."""
    return (3 * totals.program_id + totals.drafts_accepted + 1) % MAX_DRAFTS

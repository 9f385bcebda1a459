"""Every verification on many ranks against the same one on a rank that serves a request alone.

A wrong draft never shows in the text. So each drafted token and each accepted length is compared:
by what a request's known tokens alone determine, whatever else its rank and the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from dp_runtime.core.request import PromptEmbeds, RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.step_program import MAX_DRAFTS
from examples.tiny_moe.model import TinyMoe, load_model
from tests.dp_runtime.speculative.conftest import AloneOf, RanksOf
from tests.dp_runtime.speculative_ranks import Event, Fault, SpeculativeRanks, Verified
from tests.dp_runtime.speculative_scripts import (
    LONGEST,
    MORE,
    PAGE_SIZE,
    SHAPES,
    Alone,
    Script,
    cycle,
    scripts,
)
from tests.speculative_cases import DRAFTED, Drafted

NAMES = ("agreeing", "hybrid", "eagle3")  # the others are slow tests


@pytest.mark.parametrize("name", NAMES)
def test_alone(name: str, alone_of: AloneOf) -> None:
    """The reference is fit for its use: it drafts everywhere, one way or another."""
    alone = alone_of(name)
    for one, (prompt, outputs, _) in zip(alone, SHAPES):
        assert len(one.text) == prompt + outputs + MORE
        assert {*range(prompt + 1, prompt + outputs)} <= one.chains.keys()
    chains = [chain for one in alone for chain in one.chains.values()]
    assert len({*chains}) > 0.4 * len(chains)
    assert sum(len({*chain}) > 1 for chain in chains) > 0.4 * len(chains)


@pytest.mark.parametrize("name", ["agreeing", "hybrid"])
def test_alone_accepts_some(name: str, alone_of: AloneOf) -> None:
    """Of the drafts that agree in part, any number from none to several is accepted."""
    lengths = [
        one.verified(known, MAX_DRAFTS).num_accepted
        for one in alone_of(name)
        for known in one.chains
        if known <= len(one.text) - MORE
    ]
    assert {0, 1, 2, 3} <= {*lengths}


@pytest.mark.parametrize(
    ("name", "num_steps"), [("agreeing", 1), ("agreeing", 5), ("hybrid", 2), ("hybrid", 7)]
)
def test_one_rank(name: str, num_steps: int, ranks_of: RanksOf, alone_of: AloneOf) -> None:
    """A request that is alone on one rank verifies as the reference says, step after step."""
    for shape in range(len(SHAPES)):
        script = Script(1, num_steps, ((0, 0, shape, None),), overlap=shape % 2 == 1)
        script.check(script.serve(ranks_of(name, 1)), alone_of(name))


SCRIPTS = {
    "uneven": Script(3, 3, tuple((0, rank, shape, None) for rank, shape in (
        (0, 1), (0, 5), (0, 8), (1, 3), (0, 9), (1, 7),
    ))),
    "prefill in mid-decode": Script(
        2, 4, ((0, 0, 1, None), (0, 1, 5, None), (3, 0, 3, None), (5, 1, 2, None), (6, 0, 8, None)),
        spare_tokens=3,
    ),
    "idle ranks": Script(4, 5, ((0, 1, 2, None), (2, 1, 4, None), (13, 3, 0, None))),
    "one after the other": Script(
        2, 4, tuple((0, n % 2, shape, None) for n, shape in enumerate((1, 5, 2, 0, 5, 1))),
        num_requests=1,
    ),
    "few pages": Script(
        2, 2, tuple((0, rank, shape, None) for rank, shape in (
            (0, 8), (0, 1), (0, 5), (0, 9), (1, 3), (1, 5),
        )),
        num_pages=1 + -(-(LONGEST + 2) // PAGE_SIZE),
    ),
    "aborts": Script(2, 5, tuple((0, n % 2, n, 2 + n % 3) for n in (1, 3, 5, 8, 9))),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    ("name", "overlap"),
    [("agreeing", True), ("eagle3", False), ("hybrid", True), ("hybrid", False)],
)
def test_script(name: str, kind: str, overlap: bool, ranks_of: RanksOf, alone_of: AloneOf) -> None:
    script = replace(SCRIPTS[kind], overlap=overlap)
    served = script.serve(ranks_of(name, script.dp_size))
    script.check(served, alone_of(name))
    assert (served.preemptions > 0) == (kind == "few pages")
    assert served.verified


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["agreeing", "hybrid"])
def test_abandoned_steps_change_no_token(
    name: str, kind: str, overlap: bool, ranks_of: RanksOf, alone_of: AloneOf
) -> None:
    """Ranks fail at the start of a step, in its midst and in its last pass, again and again."""
    faults = [Fault(number, 3 + 5 * number, number % 3 == 1) for number in range(6)]
    script = replace(SCRIPTS[kind], overlap=overlap)
    served = script.serve(ranks_of(name, script.dp_size), faults=faults)
    script.check(served, alone_of(name))
    assert served.epochs > 1


@pytest.mark.parametrize("name", ["agreeing", "hybrid"])
@settings(max_examples=8, deadline=None)
@given(
    script=scripts(),
    faults=st.lists(
        st.builds(Fault, st.integers(0, 3), st.integers(0, 60), st.booleans()), max_size=4
    ),
)
def test_faults_at_any_point_change_no_token(
    name: str, script: Script, faults: list[Fault], ranks_of: RanksOf, alone_of: AloneOf
) -> None:
    served = script.serve(ranks_of(name, script.dp_size), faults=faults)
    script.check(served, alone_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_prompt_embeddings(
    name: str, drafted_of: Callable[[str], Drafted], ranks_of: RanksOf, alone_of: AloneOf
) -> None:
    """Other tokens with the right embeddings: the draft, too, reads those, in chunks of any end."""
    script = Script(2, 3, ((0, 0, 3, None), (0, 1, 6, None), (1, 1, 3, None)), spare_tokens=1)
    weights = load_file(drafted_of(name).model / "model.safetensors")["model.embed_tokens.weight"]
    script = replace(script, num_requests=2)
    disguised = [
        replace(event, request=in_disguise(event.request, weights)) for event in script.events
    ]
    served = ranks_of(name, 2).serve(disguised, 3, num_requests=2, num_tokens=script.num_tokens)
    script.check(served, alone_of(name))


def in_disguise(request: RankRequest, weights: Tensor) -> RankRequest:
    prompt = np.array(request.prompt_token_ids)
    positions = np.flatnonzero(np.arange(len(prompt)) % 3 != 1)
    shown = prompt.copy()
    shown[positions] = (prompt[positions] + 7) % len(weights)
    embeds = PromptEmbeds(positions, weights.numpy()[prompt[positions]])
    return replace(request, prompt_token_ids=tuple(shown.tolist()), embeds=embeds)


def check_random_script(
    script: Script, ranks: SpeculativeRanks, alone: Sequence[Alone], changing: bool
) -> None:
    if changing:
        adaptive = replace(script, num_steps=MAX_DRAFTS, num_pages=None)
        served = adaptive.serve(ranks, policy=cycle, speculative_adaptive=True)
    else:
        served = script.serve(ranks)
    script.check(served, alone)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(script=scripts(), changing=st.booleans())
def test_random_script(
    name: str, ranks_of: RanksOf, alone_of: AloneOf, script: Script, changing: bool
) -> None:
    check_random_script(script, ranks_of(name, script.dp_size), alone_of(name), changing)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", DRAFTED)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(script=scripts(), changing=st.booleans())
def test_many_random_scripts(
    name: str, ranks_of: RanksOf, alone_of: AloneOf, script: Script, changing: bool
) -> None:
    check_random_script(script, ranks_of(name, script.dp_size), alone_of(name), changing)


@dataclass(frozen=True)
class Unrolled:
    """The drafts after every prefix of a text, by the module that was trained to draft."""

    drafts: Tensor  # [rows, steps]: row t drafts what follows the tokens up to t + 1
    margins: Tensor  # [rows, steps] by which the best logit leads

    @classmethod
    @torch.inference_mode()
    def from_oracle(cls, oracle: TinyMoe, text: Sequence[int], num_steps: int) -> Unrolled:
        ids = torch.tensor([list(text)])
        trunk, _ = oracle(ids[:, :-1])
        following, drafts, margins = [ids[:, 1:]], [], []
        for _ in range(num_steps):
            embeds = [oracle.model.embed_tokens(tokens) for tokens in following]
            output, _ = oracle.mtp.unroll(embeds, trunk)[-1]
            best = oracle.mtp_logits(output[0]).topk(2)
            following.append(best.indices[None, :, 0])
            drafts.append(best.indices[:, 0])
            margins.append(best.values[:, 0] - best.values[:, 1])
        return cls(torch.stack(drafts, 1), torch.stack(margins, 1))

    def num_compared(self, one: Verified) -> int:
        """Assert that the drafts are these up to a near-tie, which decides what follows it."""
        row = one.num_known - 2
        for index, draft in enumerate(one.drafts):
            if self.margins[row, index] < MARGIN:
                return index
            assert draft == self.drafts[row, index], f"draft {index} of {one}"
        return len(one.drafts)


MARGIN = 1e-3
TINY = Path(__file__).parents[3] / "examples/tiny_moe"


def test_drafts_of_the_trained_model_are_those_of_its_module() -> None:
    oracle = load_model(TINY / "checkpoint")
    tokenizer = Tokenizer.from_file(str(TINY / "checkpoint/tokenizer.json"))
    ids = tokenizer.encode((TINY / "held_out.txt").read_text()[:3000]).ids
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    lengths = (40, 1, 23, 9)
    script = [
        Event(2 * number, number % 2, RankRequest(number, tuple(ids[:n]), params, 0, frozenset()))
        for number, n in enumerate(lengths)
    ]
    ranks = SpeculativeRanks(
        TINY / "checkpoint", 2, speculative_num_steps=4, max_model_len=64, page_size=PAGE_SIZE,
        num_pages=80, max_num_requests=2, max_num_tokens=16,
    )  # fmt: skip
    everywhere = ranks.serve(script, 4, speculative_forced_tokens=1.0)
    served = ranks.serve(script, 4)
    assert served.outputs == everywhere.outputs
    found = compared = accepted = 0
    for number, length in enumerate(lengths):
        text = (*ids[:length], *served.outputs[number])
        unrolled = Unrolled.from_oracle(oracle, text, 4)
        assert [one.num_known for one in everywhere.verified[number]] == [
            *range(length + 1, length + 16)
        ]
        for one in (*everywhere.verified[number], *served.verified[number]):
            compared += unrolled.num_compared(one)
            found += len(one.drafts)
        accepted += sum(one.num_accepted for one in served.verified[number])
    assert compared > 0.9 * found
    assert accepted > 10

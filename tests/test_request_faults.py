"""What goes wrong with one request ends that request, with its reason; the others are served on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLExecutor

from dp_runtime import Engine, EngineConfig, SamplingParams, StructuredOutputs
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.core.request import FinishReason, PromptEmbeds, RankRequest
from dp_runtime.engine.inputs import NewRequest, RequestFactory
from dp_runtime.engine.request_log import RequestLog
from dp_runtime.errors import RequestFailed
from dp_runtime.sampling.request_sampling import RequestSampling
from dp_runtime.sampling.sampler import Sampler
from dp_runtime.scheduler.request_state import RequestState
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.structured.grammar_compiler import GrammarCompiler
from dp_runtime.structured.grammar_follower import GrammarFollower
from dp_runtime.structured.structured_state import StructuredState
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.serving import check_pages_free, pools_of
from tests.workers.engines import engine as process_engine

HIDDEN = 64
MARKED = (7, 7, 7)  # the prompt of the request that fails
PROMPTS = [[1, 2, 3], [9] * 20, [4, 5]]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("one_fails")))


def thread_engine(model: Path, **fields: Any) -> Engine:
    pages = {"num_pages": 24, "page_size": 8, "max_model_len": 160}
    limits = {"max_num_requests": 4, "max_num_tokens": 64}
    fields = {**pages, **limits, **fields}
    return Engine(EngineConfig(str(model), dp_size=2, launcher="thread", device="cpu", **fields))


@pytest.fixture(scope="module")
def serving(model: Path) -> Iterator[Engine]:
    with thread_engine(model) as one:
        yield one


@pytest.fixture(scope="module")
def writing() -> Iterator[Engine]:
    with thread_engine(TINY_MODEL) as one:
        yield one


def check_the_others(one: Engine, bad: Callable[[int], Any], reason: str) -> None:
    """Serve requests on all ranks with failing ones before, among and after them."""
    expected = [one.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS]
    failing, handles = [bad(0)], []
    for prompt in PROMPTS:
        handles += [one.submit(prompt, GREEDY, dp_rank) for dp_rank in range(2)]
        failing.append(bad(1))
    for handle in failing:
        with pytest.raises(RequestFailed, match=reason):
            handle.result(60)
    tokens = [handle.result(60).token_ids for handle in handles]
    assert tokens == [one_of for one_of in expected for _ in range(2)]
    again = [one.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS]
    assert again == expected
    check_pages_free(one)
    assert one._core._admission.num_unfinished == 0


def raising_for_marked(real: Callable[..., Any], prompt_of: Callable[..., Sequence[int]]) -> Any:
    def patched(*args: Any, **kwargs: Any) -> Any:
        if tuple(prompt_of(*args, **kwargs)[:3]) == MARKED:
            raise KeyError("planted")
        return real(*args, **kwargs)

    return patched


STAGES: dict[str, tuple[type, str, Callable[..., Sequence[int]]]] = {
    "scheduling": (Scheduler, "_admitted", lambda self, request: request.prompt_token_ids),
    "batch": (RequestState, "tokens", lambda self, start, end: self.request.prompt_token_ids),
    "sampling": (
        RequestSampling, "from_request", lambda request, *args: request.prompt_token_ids
    ),
    "log probabilities": (
        Sampler, "prompt_logprobs", lambda self, logits_of, ids, n: [7, *ids.tolist()]
    ),
}  # fmt: skip


TEXT_STAGES: dict[str, tuple[type, str, Callable[..., Sequence[int]]]] = {
    "text": (RequestLog, "_read", lambda self, update: self.request.prompt_token_ids),
    "output": (RequestLog, "_finished", lambda self, *end: self.request.prompt_token_ids),
    "arrival": (RequestLog, "_arrive", lambda self, count: self.request.prompt_token_ids),
}


@pytest.mark.parametrize("stage", TEXT_STAGES)
def test_an_exception_on_the_driver_ends_its_request(
    stage: str, writing: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, prompt_of = TEXT_STAGES[stage]
    monkeypatch.setattr(owner, name, raising_for_marked(getattr(owner, name), prompt_of))
    params = SamplingParams(max_tokens=4, stop="no such text", logprobs=1, ignore_eos=True)
    check_the_others(
        writing,
        lambda dp_rank: writing.submit(MARKED, params, dp_rank),
        r"^request \d+: KeyError: 'planted'$",
    )


@pytest.mark.parametrize("at", ["compile", "advance", "mask"])
def test_an_exception_of_its_grammar_ends_its_request(
    at: str, writing: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others with grammars, in the same step, are served on."""
    bad = StructuredOutputs(regex="[0-9]{40}")
    good = replace(GREEDY, structured_outputs=StructuredOutputs(regex="[0-9a-f]{30}"))
    expected = writing.generate([[5, 6]], good)[0].token_ids
    match at:
        case "compile":
            real = GrammarCompiler.matcher

            def compiled(self: GrammarCompiler, wanted: StructuredOutputs) -> Any:
                if wanted == bad:
                    raise KeyError("planted")
                return real(self, wanted)

            monkeypatch.setattr(GrammarCompiler, "matcher", compiled)
        case "advance":
            guarded = GrammarFollower.guarded

            def fail(self: GrammarFollower, work: Any, *given: Any) -> None:
                fails = self.request.params.structured_outputs == bad and self.num_outputs > 2
                guarded(self, {}.__getitem__ if fails else work, *(["planted"] if fails else given))

            monkeypatch.setattr(GrammarFollower, "guarded", fail)
        case "mask":
            monkeypatch.setattr(StructuredState, "_executor", property(FailingExecutor.of))
    beside = []

    def submit(dp_rank: int) -> Any:
        beside.append(writing.submit([5, 6], good, dp_rank))
        return writing.submit(MARKED, replace(GREEDY, structured_outputs=bad), dp_rank)

    check_the_others(writing, submit, "KeyError: 'planted'")
    assert [handle.result(60).token_ids for handle in beside] == [expected] * len(beside)


class FailingExecutor:
    """Fails for all that it is given at once if one of it is marked, as a library would."""

    def __init__(self, state: StructuredState) -> None:
        self._real, self._followers = LLExecutor(2), state._followers

    @classmethod
    def of(cls, state: StructuredState) -> FailingExecutor:
        return cls(state)

    def unsafe_compute_mask_ptr(self, entries: list[Any], *into: int) -> None:
        given = [matcher for matcher, _ in entries]
        for follower in self._followers.values():
            if follower.matcher in given and follower.request.prompt_token_ids[:3] == MARKED:
                raise KeyError("planted")
        self._real.unsafe_compute_mask_ptr(entries, *into)


@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_ends_its_request(
    stage: str, serving: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, prompt_of = STAGES[stage]
    patched = raising_for_marked(getattr(owner, name), prompt_of)
    monkeypatch.setattr(owner, name, patched)
    scored = SamplingParams(max_tokens=4, prompt_logprobs=1, temperature=0.5)
    check_the_others(
        serving,
        lambda dp_rank: serving.submit(MARKED, scored, dp_rank),
        r"^request \d+: KeyError: 'planted'$",
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"overlap": True}, marks=pytest.mark.slow),
        pytest.param({"speculative_num_steps": 2}, marks=pytest.mark.slow),
        {"speculative_num_steps": 2, "overlap": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(temperature=0.8, top_k=5, frequency_penalty=0.5, logprobs=2)],
    ids=["greedy", "drawn"],
)
def test_nan_logits_end_their_request(
    fields: dict[str, Any],
    params: SamplingParams,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pages that it wrote are those that the next requests get, in a pool that has few."""
    with thread_engine(model, **fields) as one:
        monkeypatch.setattr(RequestFactory, "make", with_embeds(nan_embeds))
        with pytest.raises(RequestFailed):
            one.submit([*MARKED, *range(8, 28)], params, 0).result(60)
        one.generate([[1]], SamplingParams(max_tokens=1))  # a step, which needs one other page
        check_finite(one)
        check_the_others(
            one,
            lambda dp_rank: one.submit([*MARKED, *range(8, 28)], params, dp_rank),
            r"^request \d+: the model gave NaN or infinite logits for its token 0$",
        )
        check_finite(one)


def check_finite(one: Engine) -> None:
    """No page has what an ended request left: other kernels read masked columns too."""
    assert all(pool.isfinite().all() for pools in pools_of(one) for pool in pools)


def nan_embeds(request: RankRequest) -> PromptEmbeds:
    """What a bad weight or an overflow makes of all positions."""
    positions = np.arange(len(request.prompt_token_ids))
    return PromptEmbeds(positions, np.full((len(positions), HIDDEN), np.nan, np.float32))


def with_embeds(embeds_of: Callable[[RankRequest], PromptEmbeds]) -> Any:
    """RequestFactory.make that gives marked requests embeddings which no check lets pass."""
    real = RequestFactory.make

    def make(*args: Any) -> NewRequest:
        new = real(*args)
        if tuple(new.request.prompt_token_ids[:3]) == MARKED:
            return replace(new, request=replace(new.request, embeds=embeds_of(new.request)))
        return new

    return make


def test_an_aborted_prefill_leaves_no_nan(serving: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits were never seen, and other requests get its pages."""
    monkeypatch.setattr(RequestFactory, "make", with_embeds(nan_embeds))
    expected = serving.generate([[9] * 20], GREEDY)[0].token_ids
    for _ in range(4):
        handle = serving.submit([*MARKED] * 45, GREEDY, 0)
        handle.abort()
        with suppress(RequestFailed):  # it may be faster than the abort
            assert handle.result(60).finish_reason is FinishReason.ABORT
        outputs = serving.generate([[9] * 20] * 3, GREEDY, [0] * 3)
        assert [output.token_ids for output in outputs] == [expected] * 3
        check_finite(serving)


class Unreadable(PromptEmbeds):
    """Arrives at a rank as something that can not be read."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_a_message_that_a_rank_can_not_read_ends_its_request(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"page_size": 8, "num_pages": 24, "max_model_len": 160}
    with process_engine(model, "local", dp_size=2, **fields) as one:
        nothing = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
        unreadable = with_embeds(lambda request: Unreadable(*nothing))
        monkeypatch.setattr(RequestFactory, "make", unreadable)
        check_the_others(
            one, lambda dp_rank: one.submit(MARKED, GREEDY, dp_rank), r"ValueError: invalid literal"
        )

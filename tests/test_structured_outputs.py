"""Texts of the trained tiny model that fit what was asked for, however the ranks serve them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import FormatChecker, validate
from safetensors.torch import load_file

from dp_runtime import Engine, RequestOutput, SamplingParams, StructuredOutputs
from dp_runtime.cli.jsonl import read_prompts
from dp_runtime.core.request import FinishReason
from dp_runtime.errors import RequestFailed
from tests.checkpoints import eagle3_checkpoint
from tests.serving import check_pages_free
from tests.speculative_cases import TRAINED, Drafted, engine_of
from tests.structured_cases import CHOICES, COMPACT, GRAMMARS, REGEXES, SCHEMAS

FORMATS = FormatChecker(formats=("date", "uuid", "ipv4", "ipv6"))
TIME = re.compile(r"\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
FORMATS.checks("time")(lambda value: TIME.fullmatch(value) is not None)

BY_GRAMMAR = dict(
    zip(GRAMMARS, (r"x[yz]{1,4}w", r"\d{1,3}(\+\d{1,3}){1,3}", r"\[[a-f]\d?(,[a-f]\d?)?\]",
                   r"answer: (true|false)"), strict=True)
)  # fmt: skip
SAMPLE = (
    "null", "integer", "number", "enum of all types", "optional", "nested", "array of objects",
    "anyOf objects", "recursive", "pattern unicode", "uuid", "tool call",
)  # fmt: skip
SPACED = ("object", "prefixItems")
WANTED = [
    *(StructuredOutputs(json=SCHEMAS[name] | COMPACT) for name in SAMPLE),
    *(StructuredOutputs(json=SCHEMAS[name]) for name in SPACED),
    *(StructuredOutputs(regex=regex) for regex in REGEXES[:5]),
    *(StructuredOutputs(choice=choices) for choices in CHOICES[1:4]),
    *(StructuredOutputs(grammar=grammar) for grammar in GRAMMARS),
]
FREE = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
PARAMS = [
    *(replace(FREE, max_tokens=160, ignore_eos=False, structured_outputs=one) for one in WANTED),
    *(SamplingParams(max_tokens=160, seed=n, structured_outputs=WANTED[n]) for n in (3, 5, 11, 15)),
    *[FREE] * 4,
]
PROMPTS = [f"The value of number {index} is " for index in range(len(PARAMS))]


def check_fits(wanted: StructuredOutputs, output: RequestOutput) -> None:
    text = output.text
    assert output.finish_reason is FinishReason.STOP, (wanted, text)
    match wanted:
        case StructuredOutputs(json=str(schema)):
            validate(json.loads(text), json.loads(schema), format_checker=FORMATS)
        case StructuredOutputs(json_object=True):
            assert isinstance(json.loads(text), dict)
        case StructuredOutputs(regex=str(regex)):
            assert re.fullmatch(regex, text)
        case StructuredOutputs(choice=tuple(choices)):
            assert text in choices
        case StructuredOutputs(grammar=str(grammar)):
            assert re.fullmatch(BY_GRAMMAR[grammar], text)


def threads(dp_size: int = 1, num_steps: int = 0, **fields: Any) -> Engine:
    return engine_of(
        TRAINED, num_steps, dp_size, **{"max_model_len": 256, "max_num_requests": 40} | fields
    )


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    with threads() as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(plain: Engine) -> list[RequestOutput]:
    return plain.generate(PROMPTS, PARAMS)


def test_all_texts_fit(expected: list[RequestOutput]) -> None:
    for params, output in zip(PARAMS, expected, strict=True):
        if params.structured_outputs is not None:
            check_fits(params.structured_outputs, output)


def test_others_are_as_if_they_were_alone(plain: Engine, expected: list[RequestOutput]) -> None:
    alone = plain.generate(PROMPTS[-4:], FREE)
    assert [one.token_ids for one in alone] == [one.token_ids for one in expected[-4:]]


FEW: dict[str, Any] = {"num_pages": 18, "max_num_requests": 16}
RUNS: dict[str, dict[str, Any]] = {
    "dp2 preempted overlap": {"dp_size": 2, "overlap": True, "max_num_tokens": 24} | FEW,
    "dp2 preempted adaptive drafts": {
        "dp_size": 2, "num_steps": 3, "overlap": True, "speculative_adaptive": True,
    } | FEW,
    "overlap": {"overlap": True},
    "dp4 overlap": {"dp_size": 4, "overlap": True},
    "dp2 drafts": {"dp_size": 2, "num_steps": 3, "overlap": True},
    "preempted adaptive drafts": {"num_steps": 4, "speculative_adaptive": True} | FEW,
}  # fmt: skip
BY_DEFAULT = ("dp2 preempted overlap", "dp2 preempted adaptive drafts")


@pytest.mark.parametrize(
    "run",
    [pytest.param(run, marks=[] if run in BY_DEFAULT else [pytest.mark.slow]) for run in RUNS],
)
def test_texts_depend_on_the_request_alone(run: str, expected: list[RequestOutput]) -> None:
    """With requests between that are aborted in the queue, while they run, and as they begin."""
    endless = SamplingParams(max_tokens=150, structured_outputs=StructuredOutputs(regex="[a-z ]+"))
    with threads(**RUNS[run]) as engine:
        doomed = [engine.submit(PROMPTS[0], endless) for _ in range(4)]
        handles = [
            engine.submit(prompt, params, index % engine.config.dp_size)
            for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS))
        ]
        doomed += [engine.submit(PROMPTS[0], endless) for _ in range(4)]
        for handle in doomed[::2]:
            handle.abort()
        for handle in doomed[1::2]:
            next(iter(handle))
            handle.abort()
        outputs = [handle.result(120) for handle in handles]
        for handle in doomed:
            handle.result(120)
        check_pages_free(engine)
        report = engine.report()
    assert [one.text for one in outputs] == [one.text for one in expected]
    assert [one.token_ids for one in outputs] == [one.token_ids for one in expected]
    assert (report.preemptions > 0) == ("preempted" in run)
    assert (report.drafts_accepted > 0) == ("drafts" in run)


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> Drafted:
    """A head that knows few tokens, and drafts them at random."""
    head = tmp_path_factory.mktemp("eagle3")
    return Drafted(TRAINED.model, eagle3_checkpoint(head, TRAINED.model, 4, seed=1))


def its_tokens(eagle3: Drafted) -> list[int]:
    """Of what is made of them alone, it drafts much as the target has it."""
    assert eagle3.head is not None
    knows = load_file(eagle3.head / "model.safetensors")["t2d"]
    return [int(token) for token in knows.nonzero().flatten()]


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_drafts_of_an_eagle3_head_change_no_text(
    dp_size: int, overlap: bool, eagle3: Drafted, plain: Engine
) -> None:
    assert plain.tokenizer is not None
    tokens = its_tokens(eagle3)
    words = "|".join(re.escape(plain.tokenizer.decode([token])) for token in tokens)
    some = StructuredOutputs(regex=f"({words}){{9,40}}")
    params = [replace(FREE, structured_outputs=one) for one in WANTED[1::8]]
    flat = replace(
        FREE, temperature=9.0, structured_outputs=some, allowed_token_ids=tokens, ignore_eos=False
    )
    params += [replace(flat, seed=seed) for seed in range(4)] + [FREE]
    prompts = PROMPTS[: len(params)]
    expected = plain.generate(prompts, params)
    fields = {"max_model_len": 256, "max_num_requests": 16, "overlap": overlap}
    with engine_of(eagle3, 3, dp_size, **fields) as engine:
        outputs = engine.generate(prompts, params)
        report = engine.report()
        check_pages_free(engine)
    assert [one.token_ids for one in outputs] == [one.token_ids for one in expected]
    assert report.drafts_accepted > 0


def one_text(engine: Engine, wanted: dict[str, Any], **more: Any) -> RequestOutput:
    params = {"max_tokens": 40, "temperature": 0.0, "structured_outputs": wanted} | more
    return engine.submit("Once upon a time", SamplingParams.from_fields(params)).result(60)


def test_the_end_of_text_comes_where_the_grammar_allows_it(plain: Engine) -> None:
    (eos,) = plain.model.eos_token_ids
    ended = one_text(plain, {"choice": ["it is"]})
    assert (ended.text, ended.stop_reason, ended.token_ids[-1]) == ("it is", eos, eos)
    ignored = one_text(plain, {"choice": ["it is"]}, ignore_eos=True)
    assert (ignored.text, ignored.finish_reason) == ("it is", FinishReason.STOP)
    longest = one_text(plain, {"regex": "(ab){1,6}"}, ignore_eos=True)
    assert longest.text == "ab" * 6, "it ends where nothing else can come"
    truncated = one_text(plain, {"regex": "[a-z]{30,}"}, max_tokens=5)
    assert (truncated.finish_reason, len(truncated.token_ids)) == (FinishReason.LENGTH, 5)
    some = one_text(plain, {"regex": "(ab){1,6}"}, min_tokens=4, logit_bias={eos: 100})
    assert len(some.token_ids) > 4
    assert re.fullmatch("(ab){1,6}", some.text)


def test_stops_end_a_text_before_its_grammar_does(plain: Engine) -> None:
    free = one_text(plain, {"regex": "[a-z ]{30}"}, logprobs=2)
    early = one_text(plain, {"regex": "[a-z ]{30}"}, stop_token_ids=[free.token_ids[3]])
    last = early.token_ids.index(free.token_ids[3])
    assert early.token_ids == free.token_ids[: last + 1]
    stop = free.text[6:9]
    assert one_text(plain, {"regex": "[a-z ]{30}"}, stop=stop).text == free.text.partition(stop)[0]
    assert free.logprobs is not None
    best = [entry.top[0][0] for entry in free.logprobs]
    assert best != [*free.token_ids], "log probabilities are those of all tokens"
    assert all(entry.logprob <= entry.top[0][1] for entry in free.logprobs)


@pytest.mark.parametrize(
    ("wanted", "more", "reason"),
    [
        ({"choice": ["yes"]}, {"min_tokens": 9}, "token 2, or structured_outputs leave none"),
        ({"regex": "[0-9]{5}"}, {"allowed_token_ids": [300]}, "structured_outputs leave none"),
        ({"regex": r"\p{L}{200,9999}"}, {"max_tokens": 200}, "structured_outputs: .*many states"),
    ],
)
def test_a_request_that_can_t_go_on_fails_alone(
    plain: Engine, expected: list[RequestOutput], wanted: Any, more: dict[str, Any], reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("dp_runtime.structured.matchers.MAX_LEXER_STATES", 2000)
    handles = [plain.submit(PROMPTS[n], PARAMS[n]) for n in (0, 5, -1)]
    with pytest.raises(RequestFailed, match=reason):
        one_text(plain, wanted, **more)
    assert [handle.result(60).text for handle in handles] == [expected[n].text for n in (0, 5, -1)]
    check_pages_free(plain)


def test_mistakes_are_found_at_submit(plain: Engine) -> None:
    for wanted, reason in (({"regex": "("}, "unclosed"), ({"json": {"type": "x"}}, "Invalid type")):
        params = SamplingParams.from_fields({"structured_outputs": wanted})
        with pytest.raises(ValueError, match=rf"^structured_outputs\.\w+: .*{reason}"):
            plain.submit("a", params)
        with pytest.raises(
            ValueError, match=rf"^prompts\[1\]: structured_outputs\.\w+: .*{reason}"
        ):
            plain.generate(["a", "b"], [SamplingParams(), params])
    check_pages_free(plain)


def test_prompt_files_have_structured_outputs(tmp_path: Path, plain: Engine) -> None:
    lines: Sequence[dict[str, Any]] = [
        {"prompt": "a", "structured_outputs": {"json": {"const": 5}}, "temperature": 0},
        {"prompt": "b", "structured_outputs": {"choice": ["x"], "regex": None}},
        {"prompt": "c", "structured_outputs": None, "max_tokens": 1},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = read_prompts(path, SamplingParams())
    outputs = plain.generate([one.prompt for one in given], [one.params for one in given])
    assert [one.text for one in outputs[:2]] == ["5", "x"]
    path.write_text(json.dumps({"prompt": "a", "structured_outputs": {"pattern": "a"}}))
    with pytest.raises(ValueError, match=r":1: structured_outputs: \{'pattern': 'a'\} .* known"):
        read_prompts(path, SamplingParams())


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_schema_regex_and_choice_is_kept(temperature: float, num_steps: int) -> None:
    wanted = [
        *(StructuredOutputs(json=schema) for schema in SCHEMAS.values()),
        *(StructuredOutputs(json=schema | COMPACT) for schema in SCHEMAS.values()),
        *(StructuredOutputs(regex=regex) for regex in REGEXES),
        *(StructuredOutputs(choice=choices) for choices in CHOICES),
        *(StructuredOutputs(grammar=grammar) for grammar in GRAMMARS),
    ]
    assert len(SCHEMAS) >= 50
    params = [
        SamplingParams(max_tokens=900, temperature=temperature, seed=n, structured_outputs=one)
        for n, one in enumerate(wanted)
    ]
    fields = {"max_model_len": 1024, "max_num_requests": 80, "overlap": True}
    with threads(2, num_steps, **fields) as engine:
        outputs = engine.generate(["Value: "] * len(wanted), params)
        check_pages_free(engine)
    for one, output in zip(wanted, outputs, strict=True):
        check_fits(one, output)

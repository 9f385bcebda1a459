"""Grammars are tried in a process of its own: what is much work, or crashes it, is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from dp_runtime.core.structured_outputs import MAX_BYTES, StructuredOutputs
from dp_runtime.errors import EngineClosed
from dp_runtime.structured import grammar_trial
from dp_runtime.structured.grammar_trial import GrammarTrial
from tests.dp_runtime.structured.vocabulary import (
    EOS,
    TOKENIZER_JSON,
    VOCAB,
    compiler,
    regex,
    tokens_of,
)
from tests.signals import stop
from tests.structured_cases import chain


@pytest.fixture(scope="module")
def trial() -> Iterator[GrammarTrial]:
    trial = GrammarTrial(TOKENIZER_JSON, VOCAB, (EOS,))
    yield trial
    trial.close()


def options(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(count)}}


HOSTILE: list[dict[str, Any]] = [
    {"regex": "(a{1,1000}){1,1000}"},
    {"regex": "(.*a.{15}b|.*b.{17}c)"},
    {"regex": r"\p{L}{1,5000}"},
    {"regex": "|".join(f"word{n}" for n in range(25_000))},
    {"json": {"enum": [f"value{n}" for n in range(15_000)]}},
    {"json": {"allOf": [{"oneOf": [{"pattern": f"^a{n}"} for n in range(8)]}] * 6}},
    {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    {"json": {"type": "integer", "multipleOf": 9973}},
    {"json": {"multipleOf": 1e308}},
    {"json": {"type": "string", "pattern": "(.*a.{15}b|.*b.{17}c)"}},
    {"grammar": 'start: s\ns: s s | s s s | "a" | ""'},
    {"grammar": 'start: (("a"{1,1000}){1,1000}){1,1000}'},
    {"grammar": "start: T\nT: (/.*a.{10}/ & /.*b.{11}/ & ~/.*c.{9}/)"},
    {"grammar": "start: " + "x" * (MAX_BYTES - 7)},
]  # fmt: skip


@pytest.mark.parametrize("given", HOSTILE, ids=lambda given: str(given)[:60])
def test_hostile_grammars_end(trial: GrammarTrial, given: dict[str, Any]) -> None:
    """Each is refused, or served until a limit is met: the work of a token is bounded."""
    wanted = StructuredOutputs(**given)
    try:
        trial.check(wanted)
    except ValueError:
        return
    matcher = compiler().matcher(wanted)
    for token in tokens_of("aaabbbabab" * 3):
        matcher.compute_bitmask()
        if not matcher.consume_token(token):
            assert matcher.is_error()
            break


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"json": chain(3000)}, "the compiler ends with it"),
    ({"json": options(600)}, "Current row has"),  # only behind the first brace
    ({"regex": "(" * 50_000 + "a" + ")" * 50_000}, "invalid regex"),
    ({"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000}, "nest"),
]


@pytest.mark.parametrize(("given", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_crashes_or_meets_a_limit_is_refused(
    trial: GrammarTrial, given: dict[str, Any], reason: str
) -> None:
    (kind,) = given
    with pytest.raises(ValueError, match=rf"^structured_outputs\.{kind}: ") as caught:
        trial.check(StructuredOutputs(**given))
    assert reason in str(caught.value)[-400:]
    trial.check(StructuredOutputs(json=chain(100)))  # the next one is served


def test_what_is_much_work_is_ended(trial: GrammarTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may count no time of a process that others interrupt: one of some is ended."""

    def is_ended(count: int) -> bool:
        try:
            trial.check(StructuredOutputs(json=options(count)))
        except ValueError as error:
            assert "it takes more than 0.01 s of a processor" in str(error)  # noqa: PT017
            return True
        return False

    with monkeypatch.context() as patch:
        patch.setattr(grammar_trial, "MAX_WORK_S", 0.01)
        count = next(count for count in range(450, 440, -1) if is_ended(count))
    trial.check(StructuredOutputs(json=options(count)))


def test_the_text_of_a_special_token_is_text(trial: GrammarTrial) -> None:
    """Forced text is tried as tokens, and as a token this one is no text."""
    trial.check(StructuredOutputs(choice=["<|endoftext|>"]))
    trial.check(StructuredOutputs(json={"const": "a <|endoftext|> b"}))


def test_a_process_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    before = trials()
    trial = GrammarTrial(TOKENIZER_JSON, VOCAB, (EOS,))
    trial.check(regex("a"))
    (process,) = trials() - before
    stop(process.pid)
    monkeypatch.setattr(grammar_trial, "TRIAL_S", 0.1)
    assert trial._process is not None
    trial._process.channel.settimeout(0.1)
    with pytest.raises(ValueError, match=r"it takes more than 0\.1 s to compile"):
        trial.check(regex("b"))
    monkeypatch.undo()
    assert not process.is_running()
    trial.check(regex("c"))
    trial.close()
    assert trials() == before
    with pytest.raises(EngineClosed):
        trial.check(regex("d"))


def trials() -> set[psutil.Process]:
    found = psutil.Process().children()
    return {each for each in found if "matchers.py" in " ".join(each.cmdline())}


def test_what_was_checked_last_is_known(
    trial: GrammarTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    try_it = trial._try

    def count(wanted: StructuredOutputs) -> None:
        made.append(str(wanted.regex))
        try_it(wanted)

    monkeypatch.setattr(trial, "_try", count)
    monkeypatch.setattr(grammar_trial, "MAX_KNOWN_BYTES", 2.5 * grammar_trial.ENTRY_BYTES)
    for text in "abacbab":
        trial.check(regex(text))
    assert made == ["a", "b", "c", "b", "a"]
    for _ in range(2):
        with pytest.raises(ValueError, match="unclosed"):
            trial.check(regex("("))


def test_threads_share_a_trial(trial: GrammarTrial) -> None:
    found: list[bool] = []

    def work(number: int) -> None:
        try:
            trial.check(regex("[a-d]" if number % 3 else "(" * number))
            found.append(True)
        except ValueError:
            found.append(False)

    threads = [threading.Thread(target=work, args=(3 + number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == 4 * [False] + 8 * [True]

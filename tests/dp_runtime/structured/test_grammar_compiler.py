"""Compiled grammars: their masks against a search over all tokens, and what is refused."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models

from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.structured import matchers
from dp_runtime.structured.grammar_compiler import GrammarCompiler
from tests.dp_runtime.structured.vocabulary import (
    EOS,
    TOKENIZER_JSON,
    VOCAB,
    compiler,
    regex,
    texts,
    token_ids,
    tokens_of,
)
from tests.structured_cases import CHOICES, GRAMMARS, REFUSED, REGEXES, SCHEMAS


def allowed(matcher: LLMatcher) -> set[int]:
    return token_ids(np.frombuffer(matcher.compute_bitmask(), np.uint8))


def words(pattern: str, alphabet: str, longest: int) -> Iterator[str]:
    """All texts of an alphabet that a regex matches."""
    for length in range(longest + 1):
        for letters in itertools.product(alphabet, repeat=length):
            if re.fullmatch(pattern, text := "".join(letters)):
                yield text


LANGUAGES = [
    (regex("[ab]{1,3}c?|ba{2}b"), [*words("[ab]{1,3}c?|ba{2}b", "abc", 4)]),
    (regex("-?[0-9]{1,2}"), [*words("-?[0-9]{1,2}", "-0123456789", 3)]),
    (StructuredOutputs(choice=CHOICES[1]), [*CHOICES[1]]),
    (StructuredOutputs(choice=["the end", "then", "a"]), ["the end", "then", "a"]),
    (StructuredOutputs(json={"enum": [True, "the"]}), ["true", '"the"']),
    (StructuredOutputs(grammar='start: "in" ("to" | " the"){0,2}'),
     ["in", "into", "in the", "intoto", "into the", "in theto", "in the the"]),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "language"), LANGUAGES, ids=lambda value: str(value)[:40])
def test_a_mask_has_the_tokens_that_some_text_goes_on_with(
    wanted: StructuredOutputs, language: list[str]
) -> None:
    letters = {*"".join(language)}
    possible = [(token, text) for token, text in enumerate(texts()) if text and {*text} <= letters]
    for text in language:
        tokens = tokens_of(text)
        matcher = compiler().matcher(wanted)
        for count in range(len(tokens) + 1):
            before = "".join(texts()[token] for token in tokens[:count])
            due = {
                token
                for token, more in possible
                if any(other.startswith(before + more) for other in language)
            }
            if before in language:
                due.add(EOS)
            found, end = allowed(matcher), len(before)
            following = {text[end : end + 1] for text in language if text.startswith(before)}
            if len(following) == 1:  # a text that is certain comes in the tokenizer's own tokens
                assert found <= due, before
                assert found, before
            else:
                assert found == due, before
            if count < len(tokens):
                assert matcher.consume_token(tokens[count])


@pytest.mark.parametrize("vocab_size", [VOCAB, VOCAB + 1, 3100, 4096])
def test_tokens_that_only_the_model_has_are_masked(vocab_size: int) -> None:
    matcher = compiler(vocab_size).matcher(regex(r"(?s:.*)"))
    whole = {token for token, text in enumerate(texts()) if "\ufffd" not in text}
    assert whole <= allowed(matcher) <= {*range(VOCAB)}


def test_a_model_may_lack_tokens_of_the_tokenizer() -> None:
    """Such as embeddings that were cut; those tokens are in no mask that the sampler sees."""
    assert compiler(600).vocabulary.vocab_size == VOCAB
    assert EOS in allowed(compiler(600).matcher(regex("a?")))


@pytest.mark.parametrize(
    "wanted",
    [
        *(StructuredOutputs(json=schema) for schema in SCHEMAS.values()),
        *(StructuredOutputs(choice=choices) for choices in CHOICES),
        *(StructuredOutputs(grammar=grammar) for grammar in GRAMMARS),
        *map(regex, REGEXES),
        StructuredOutputs(json_object=True),
    ],
    ids=str,
)
def test_what_is_supported_has_a_first_token(wanted: StructuredOutputs) -> None:
    assert allowed(compiler().matcher(wanted)) - {EOS}


@pytest.mark.parametrize(("kind", "value", "reason"), REFUSED, ids=str)
def test_what_is_refused_says_why_in_one_line(kind: str, value: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is checked below
        compiler().matcher(StructuredOutputs(**{kind: value}))
    text = str(caught.value)
    assert text.startswith(f"structured_outputs.{kind}: "), text
    assert reason in text
    assert text.isprintable()
    assert len(text) < 1000


def test_a_limit_that_one_matcher_meets_is_not_another_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matchers, "MAX_LEXER_STATES", 2000)
    wanted, (token,) = regex(r"\p{L}{1,9999}"), tokens_of("e")
    first, second = compiler().matcher(wanted), compiler().matcher(wanted)
    while not first.is_error():
        first.compute_bitmask()
        first.consume_token(token)
    assert "too many states" in first.get_error()
    assert token in allowed(second)


def test_threads_share_a_compiler() -> None:
    shared = GrammarCompiler(TOKENIZER_JSON, VOCAB, (EOS,))
    found: list[set[int]] = []

    def work(number: int) -> None:
        found.append(allowed(shared.matcher(regex(f"[a-d]{{{1 + number % 3},9}}"))))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 12
    assert all(found)


NO_BYTES = HfTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
NO_BYTES.decoder = decoders.WordPiece()


@pytest.mark.parametrize(
    ("tokenizer_json", "eos", "text"),
    [
        (None, (EOS,), "None: the model's directory has no tokenizer.json"),
        (TOKENIZER_JSON, (), "None: the model has no end-of-text token"),
        (TOKENIZER_JSON, (VOCAB,), "None: the model has no end-of-text token"),
        (NO_BYTES.to_str(), (EOS,), "llguidance can't read tokenizer.json: can't determine"),
        ("{}", (EOS,), "llguidance can't read tokenizer.json: error"),
    ],
)
def test_models_without_structured_outputs(
    tokenizer_json: str | None, eos: tuple[int, ...], text: str
) -> None:
    with pytest.raises(ValueError, match=rf"structured_outputs.*is not allowed; {text}"):
        GrammarCompiler(tokenizer_json, VOCAB, eos).matcher(regex("a"))


def test_without_the_extra_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dp_runtime.structured.grammar.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^structured_outputs: .*'dp-runtime\[structured\]'$"):
        GrammarCompiler(TOKENIZER_JSON, VOCAB, (EOS,)).matcher(regex("a"))

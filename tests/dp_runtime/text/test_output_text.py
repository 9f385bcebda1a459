"""Text that continues a prompt, and stop strings that name special tokens."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer

from dp_runtime.text.output_text import OutputText
from dp_runtime.text.stop_strings import StopStrings
from dp_runtime.text.tokenizer import Tokenizer
from tests.dp_runtime.text.test_tokenizer import PAIRS, SENTENCES, each_kind, run, some_tokens

END = "<|end|>"


def with_end(kind: str) -> tuple[HfTokenizer, Tokenizer, int]:
    """A tokenizer with one more special token, as chat models have them."""
    oracle = HfTokenizer.from_str(PAIRS[kind][0].to_str())
    oracle.add_special_tokens([END, "<|end|>x"])
    return oracle, Tokenizer(oracle.to_str()), id_of(oracle, END)


def id_of(oracle: HfTokenizer, token: str) -> int:
    token_id = oracle.token_to_id(token)
    assert token_id is not None, token
    return token_id


@each_kind
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), skip=st.booleans())
def test_prompt_and_text_are_the_text_of_all_tokens(kind: str, seed: int, skip: bool) -> None:
    rng = random.Random(seed)
    oracle, tokenizer = PAIRS[kind]
    ids = oracle.encode(rng.choice(SENTENCES)).ids
    special = oracle.token_to_id("<s>") or oracle.token_to_id("[CLS]") or oracle.token_to_id("the")
    for _ in range(rng.randrange(3)):
        ids.insert(rng.randrange(len(ids) + 1), special or 0)
    cut = rng.randrange(len(ids) + 1)
    prompt = oracle.decode(ids[:cut], skip_special_tokens=skip)
    text = OutputText(tokenizer, prompt_token_ids=ids[:cut], skip_special_tokens=skip)
    shown = run(text, [[token] for token in ids[cut:]])[0]
    everything = oracle.decode(ids, skip_special_tokens=skip)
    if everything.startswith(prompt):  # no character lies on both sides
        assert prompt + shown == everything
    else:
        assert prompt.endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("kind", ["metaspace", "byte_fallback"])
@pytest.mark.parametrize("prompt", [["▁the"], ["<s>", "▁the", "<s>"], ["<0xC3>", "<0xA9>"], ["▁"]])
def test_a_continuation_keeps_its_first_space(kind: str, prompt: list[str]) -> None:
    oracle, tokenizer = PAIRS[kind]
    before = [id_of(oracle, token) for token in prompt]
    after = [id_of(oracle, "▁cat"), id_of(oracle, "▁the")]
    assert run(OutputText(tokenizer, (), 0, before), [after])[0] == " cat the"
    shown, stop, kept = run(OutputText(tokenizer, [" cat"], 0, before), [after])
    assert (shown, stop, kept) == ("", " cat", 1)
    assert run(OutputText(tokenizer), [after])[0] == "cat the", "nothing is before it"


@each_kind
@pytest.mark.parametrize("step", [1, 9])
def test_a_special_token_as_stop_string_ends_the_text_before_it(kind: str, step: int) -> None:
    oracle, tokenizer, end = with_end(kind)
    words = oracle.encode(SENTENCES[1]).ids[:6]
    ids = [*words, end, *words]
    pieces = [ids[at : at + step] for at in range(0, len(ids), step)]
    shown, stop, kept = run(OutputText(tokenizer, ["nowhere", END]), pieces)
    assert (shown, stop, kept) == (oracle.decode(words), END, len(words) + 1)
    shown, stop, kept = run(OutputText(tokenizer), pieces)
    assert (shown, stop, kept) == (oracle.decode(ids), None, len(ids))
    shown, stop, _ = run(OutputText(tokenizer, skip_special_tokens=False), pieces)
    assert (shown, stop) == (oracle.decode(ids, skip_special_tokens=False), None)
    shown, stop, kept = run(OutputText(tokenizer, [END], 0, (), False), pieces)
    assert shown == oracle.decode(ids[: len(words) + 1], skip_special_tokens=False)[: -len(END)]
    assert (stop, kept) == (END, len(words) + 1)


def test_a_stop_string_may_contain_a_special_token() -> None:
    oracle, tokenizer, end = with_end("byte_level")

    def encode(text: str) -> list[int]:
        return list(oracle.encode(text).ids)

    before, after = encode("so be it"), encode("ab and more")
    ids = [*before, end, *after]
    shown, stop, kept = run(OutputText(tokenizer, [f"it{END}ab"]), [[token] for token in ids])
    assert (shown, stop) == ("so be ", f"it{END}ab")
    assert oracle.decode(ids[:kept], skip_special_tokens=False).startswith(f"so be it{END}ab")
    shown, stop, _ = run(OutputText(tokenizer, [f"it{END}b"]), [[token] for token in ids])
    assert (shown, stop) == ("so be itab and more", None), "held until it can't match any more"
    shown, stop, _ = run(OutputText(tokenizer, ["itab", f"{END}!"]), [[token] for token in ids])
    assert (shown, stop) == ("so be ", "itab"), "others are looked for in the text that is shown"
    spelt = encode("so <|en") + encode("d|> it")
    assert end not in spelt
    shown, stop, _ = run(OutputText(tokenizer, [END]), [[token] for token in spelt])
    assert (shown, stop) == ("so ", END), "also where ordinary tokens spell it"
    twice = [end, end, *before]
    assert run(OutputText(tokenizer, [END + END]), [[token] for token in twice]) == (
        "", END + END, 2,
    )  # fmt: skip


def test_an_unfinished_character_before_a_special_stop_token_is_shown() -> None:
    for kind in ("byte_level", "byte_fallback"):
        oracle, tokenizer, end = with_end(kind)
        byte = id_of(oracle, "Ã" if kind == "byte_level" else "<0xC3>")
        shown, stop, _ = run(OutputText(tokenizer, [END]), [[byte], [end]])
        assert (shown, stop) == ("\N{REPLACEMENT CHARACTER}", END)


def test_min_tokens_holds_for_special_stop_tokens() -> None:
    oracle, tokenizer, end = with_end("byte_level")
    ids = [end, *oracle.encode("ab").ids, end, *oracle.encode("cd").ids]
    shown, stop, _ = run(OutputText(tokenizer, [END], min_tokens=1), [[token] for token in ids])
    assert (shown, stop) == ("ab", END)


@each_kind
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_special_stop_tokens_end_random_text_where_they_first_stand(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    oracle, tokenizer, end = with_end(kind)
    ids = some_tokens(kind, rng)
    ids.insert(rng.randrange(len(ids) + 1), end)
    at = ids.index(end)
    shown, stop, kept = run(OutputText(tokenizer, [END]), [[token] for token in ids])
    assert (shown, stop, kept) == (oracle.decode(ids[:at]), END, at + 1)


@each_kind
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), skip=st.booleans())
def test_the_stop_string_may_be_part_of_the_text(kind: str, seed: int, skip: bool) -> None:
    rng = random.Random(seed)
    oracle, tokenizer, end = with_end(kind)
    ids = some_tokens(kind, rng)
    ids.insert(rng.randrange(len(ids) + 1), end)
    pieces = [ids[at : at + 2] for at in range(0, len(ids), 2)]
    everything = oracle.decode(ids, skip_special_tokens=False)
    at = rng.randrange(len(everything))
    stops = [everything[at : at + 1 + rng.randrange(9)], "nowhere"]
    shown, stop, kept = run(OutputText(tokenizer, stops, 0, (), skip), pieces)
    again = run(OutputText(tokenizer, stops, 0, (), skip, include_stop=True), pieces)
    assert again == (shown + (stop or ""), stop, kept)
    assert stop is not None or skip


def test_the_longest_special_token_wins() -> None:
    stops = StopStrings(["a<s>b"], ["<s>", "s"])
    assert set(stops.marks) == {"<s>", "s"}
    assert stops.feed("xa" + stops.marks["<s>"] + "b", may_match=True) == "x"
    assert stops.matched == "a<s>b"

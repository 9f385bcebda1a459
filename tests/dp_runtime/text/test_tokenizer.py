import json
import random
import time
from collections.abc import Callable, Iterable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HfTokenizer

from dp_runtime.text.output_text import OutputText
from dp_runtime.text.stop_strings import StopStrings
from dp_runtime.text.tokenizer import Tokenizer

SENTENCES = (
    "The cat sat on the mat, and the hat lay on the cat.",
    "naïve café, été: the theatre 😀😀 and 👩‍👩‍👧 there",
    "日本語のテキスト、你好世界。 the end",
)


def byte_level() -> HfTokenizer:
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("<a b>"), AddedToken("é")])
    return tokenizer


def metaspace() -> HfTokenizer:
    words = ["▁" + word for sentence in SENTENCES for word in sentence.split()]
    pieces = dict.fromkeys(["▁", "▁▁▁", "", *words, *"abcdehlmnost.,"])
    vocab = [("<unk>", 0.0)] + [(piece, -1.0 - i / 100) for i, piece in enumerate(pieces)]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = HfTokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def byte_fallback() -> HfTokenizer:
    tokenizer = metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer


def word_piece() -> HfTokenizer:
    tokenizer = HfTokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


def word_end() -> HfTokenizer:
    tokenizer = HfTokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, show_progress=False, end_of_word_suffix="</w>", special_tokens=["<unk>"]
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


def no_decoder() -> HfTokenizer:
    tokenizer = word_piece()
    tokenizer.decoder = None
    return tokenizer


KINDS: tuple[Callable[[], HfTokenizer], ...] = (
    byte_level, metaspace, byte_fallback, word_piece, word_end, no_decoder,
)  # fmt: skip
PAIRS = {kind.__name__: (made := kind(), Tokenizer(made.to_str())) for kind in KINDS}
each_kind = pytest.mark.parametrize("kind", PAIRS)


def some_tokens(kind: str, rng: random.Random) -> list[int]:
    """Random ids, of real text or of nothing, a few of which the tokenizer does not have."""
    oracle, tokenizer = PAIRS[kind]
    count = rng.randrange(30)
    if rng.random() < 0.4:
        start = rng.randrange(10)
        return list(oracle.encode(rng.choice(SENTENCES)).ids[start : start + count])
    return [rng.randrange(tokenizer.vocab_size + 2) for _ in range(count)]


def split(ids: list[int], rng: random.Random) -> list[list[int]]:
    cuts = sorted(rng.randrange(len(ids) + 1) for _ in range(rng.randrange(len(ids) + 1)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)])]


def run(text: OutputText, pieces: list[list[int]]) -> tuple[str, str | None, int]:
    """All text, the stop string, and the number of tokens that were kept."""
    shown, kept = "", 0
    for piece in pieces:
        step = text.push(piece)
        shown, kept = shown + step.text, kept + step.num_kept
        if step.stop is not None:
            return shown, step.stop, kept
    step = text.finish()
    return shown + step.text, step.stop, kept


@each_kind
def test_encode_and_decode_are_the_library_s(kind: str) -> None:
    oracle, tokenizer = PAIRS[kind]
    assert tokenizer.vocab_size == oracle.get_vocab_size()
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence)
        assert ids == oracle.encode(sentence).ids
        assert tokenizer.decode(ids) == oracle.decode(ids)
        assert tokenizer.decode(ids, False) == oracle.decode(ids, skip_special_tokens=False)


def test_encode_adds_what_the_post_processor_says_and_never_truncates() -> None:
    oracle = byte_level()
    oracle.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", oracle.token_to_id("<s>"))]
    )
    plain = oracle.encode(SENTENCES[0]).ids
    oracle.enable_truncation(4)
    oracle.enable_padding(length=500)
    tokenizer = Tokenizer(oracle.to_str())
    assert tokenizer.encode(SENTENCES[0]) == plain
    assert plain[0] == oracle.token_to_id("<s>")
    assert tokenizer.decode(plain) == SENTENCES[0]
    assert tokenizer.decode(plain, skip_special_tokens=False) == "<s>" + SENTENCES[0]


def test_bad_input_is_named() -> None:
    for text in ("", "{", "[]", '{"model": 5}', "not json"):
        with pytest.raises(ValueError, match=r"^tokenizer\.json: "):
            Tokenizer(text)
    with pytest.raises(ValueError, match=r"^prompt: 'a\\ud800' is not allowed"):
        PAIRS["byte_level"][1].encode("a\ud800")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]),
    ],
    ids=["CTC", "ByteLevel in a sequence", "Strip right", "Replace after Fuse"],
)
def test_decoder_that_can_not_be_streamed(decoder: decoders.Decoder) -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoder
    with pytest.raises(ValueError, match=r"^decoder of tokenizer\.json: \['"):
        Tokenizer(tokenizer.to_str())


@each_kind
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_steps_concatenate_to_the_decoded_text(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    ids = some_tokens(kind, rng)
    oracle, tokenizer = PAIRS[kind]
    assert run(OutputText(tokenizer), split(ids, rng)) == (oracle.decode(ids), None, len(ids))


def expected_end(kind: str, ids: list[int], stops: list[str], min_tokens: int) -> tuple[str, str]:
    """Where a stop string may end: by character, over the whole text, without an automaton."""
    oracle, tokenizer = PAIRS[kind]
    text = oracle.decode(ids)
    first = OutputText(tokenizer)
    settled = len(first.push(ids[:min_tokens]).text) if len(ids) > min_tokens else len(text)
    for end in range(settled + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, ""


@each_kind
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_text_ends_before_the_first_stop_string(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    ids, (oracle, tokenizer) = some_tokens(kind, rng), PAIRS[kind]
    text, stops = oracle.decode(ids) or "x", []
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(text))
        stops.append(text[start : start + rng.randrange(1, 8)])
    min_tokens = rng.choice([0, 0, rng.randrange(len(ids) + 1)])
    shown, stop, kept = run(OutputText(tokenizer, stops, min_tokens), split(ids, rng))
    assert (shown, stop or "") == expected_end(kind, ids, stops, min_tokens)
    assert kept == len(ids) or stop
    if stop:
        assert oracle.decode(ids[:kept]).startswith(shown + stop)
        assert kept > min_tokens
        before = OutputText(tokenizer, stops, min_tokens)
        assert all(before.push([token]).stop is None for token in ids[: kept - 1])


def ids_of(oracle: HfTokenizer, tokens: Iterable[str]) -> list[int]:
    ids = [oracle.token_to_id(token) for token in tokens]
    assert None not in ids, tokens
    return [token_id for token_id in ids if token_id is not None]


def test_text_comes_as_soon_as_it_is_settled() -> None:
    oracle, tokenizer = PAIRS["byte_level"]
    smile = ids_of(oracle, oracle.pre_tokenizer.pre_tokenize_str("😁")[0][0])
    assert len(smile) == 4
    text = OutputText(tokenizer, stop=["stop"])
    shown = [text.push([token]).text for token in smile]
    assert shown == ["", "", "", "😁"]
    letters = dict(zip("sto!", ids_of(oracle, "sto!")))
    assert [text.push([letters[char]]).text for char in "sto!"] == ["", "", "", "sto!"]
    assert text.push([letters["s"]]).text == ""
    assert text.push([smile[0]]).text == ""
    assert text.finish().text == "s\N{REPLACEMENT CHARACTER}"


def test_stop_string_that_the_end_completes() -> None:
    oracle, tokenizer = PAIRS["byte_fallback"]
    ids = ids_of(oracle, ["▁the", *(f"<0x{byte:02X}>" for byte in "é".encode())])
    text = OutputText(tokenizer, stop=["eé"])
    assert text.push(ids).text == "th"
    assert text.finish().stop == "eé"


@each_kind
def test_tokens_without_text_of_their_own(kind: str) -> None:
    """None of them may be taken for the beginning, which loses its space."""
    oracle, tokenizer = PAIRS[kind]
    names = ("", "▁", "<s>", "[CLS]", "▁the", "the", "the</w>", "Ġthe")
    ids = [token for name in names if (token := oracle.token_to_id(name)) is not None]
    for length in range(1, 5):
        for several in product(ids, repeat=length):
            expected = oracle.decode(several)
            assert run(OutputText(tokenizer), [[token] for token in several])[0] == expected


def test_nothing_comes_after_the_end() -> None:
    tokenizer = PAIRS["byte_level"][1]
    text = OutputText(tokenizer)
    text.finish()
    with pytest.raises(AssertionError, match="the text has ended"):
        text.push([1])
    with pytest.raises(AssertionError, match="the text has ended"):
        text.finish()


def test_overlapping_stop_strings() -> None:
    stops = StopStrings(["aab", "ab", "b!", "aab"])
    assert stops.feed("xaa", may_match=True) == "x"
    assert stops.feed("aab", may_match=False) == "aaaa"
    assert stops.matched is None
    assert stops.feed("!", may_match=True) == ""
    assert stops.matched == "b!"
    longest = StopStrings(["b", "ab", "aab"])
    assert longest.feed("aaab", may_match=True) == "a"
    assert longest.matched == "aab"


@each_kind
def test_time_is_linear_in_the_output(kind: str) -> None:
    """Also where every token is a wrong byte, or might begin the stop string."""
    tokenizer = PAIRS[kind][1]
    rng = random.Random(0)
    wrong = {"byte_level": "ÿ"}.get(kind, "<0xFF>")
    token = PAIRS[kind][0].token_to_id(wrong) or 5
    for ids in ([token] * 20_000, [rng.randrange(tokenizer.vocab_size) for _ in range(20_000)]):
        text = OutputText(tokenizer, stop=["\N{REPLACEMENT CHARACTER}" * 50 + "x", "tat" * 20])
        started = time.process_time()
        for one in ids:
            text.push([one])
        text.finish()
        assert time.process_time() - started < 3, "0.2 s when linear, minutes when quadratic"


def test_what_the_library_panics_at_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    words = json.loads(HfTokenizer(models.WordLevel({"a": 0}, "?")).to_str())
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(ValueError, match=r"^tokenizer\.json: not a tokenizer: Precompiled"):
        Tokenizer(json.dumps(words | {"normalizer": charsmap}))
    capfd.readouterr()  # the library prints where it was


def test_text_that_the_vocabulary_lacks_is_one_line() -> None:
    tokenizer = Tokenizer(HfTokenizer(models.WordLevel({"a": 0}, "?")).to_str())
    assert tokenizer.encode("a") == [0]
    with pytest.raises(ValueError, match=r"^prompt: 'b' is not allowed; .*Missing \[UNK\]"):
        tokenizer.encode("b")

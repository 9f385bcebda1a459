"""Text to tokens, and a request's output tokens to text as they come."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import pre_tokenizers

from dp_runtime.engine.stop_strings import StopStrings
from dp_runtime.errors import require

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PER_TOKEN = {"Metaspace", "WordPiece", "BPEDecoder", "Replace", "ByteFallback", "Strip"}


class Tokenizer:
    """A tokenizer.json of the `tokenizers` library.

    ValueError if it can't be read, or if its decoder is one whose text can't be streamed.
    """

    def __init__(self, tokenizer_json: str) -> None:
        try:
            self._tokenizer = HfTokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"tokenizer.json: not a tokenizer; {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoders = _decoders(json.loads(tokenizer_json).get("decoder"))
        self._byte_level = decoders == ["ByteLevel"]
        require(
            self._byte_level or _local(decoders), "decoder of tokenizer.json", decoders,
            f"ByteLevel alone, or any of {', '.join(sorted(_PER_TOKEN))}, then Fuse and Strip",
        )  # fmt: skip
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content for token in added.values() if token.special}

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the post-processor adds."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt: {text[:40]!r} is not allowed; {error}") from error
        return list(self._tokenizer.encode(text).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the tokenizer does not have are left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def shown_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None if it is special or unknown."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return None if token in self._special else token

    def text_stream(self) -> TextStream:
        """Decodes one sequence piece by piece."""
        return _ByteLevelStream(self) if self._byte_level else _WindowStream(self)

    def token_bytes(self, token: str) -> bytes:
        """What the byte-level decoder makes of a token; one with other characters is literal."""
        try:
            return bytes(map(self._bytes.__getitem__, token))
        except KeyError:
            return token.encode()

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """Byte of each character of the byte-level alphabet (OpenAI's GPT-2 encoder, 2019)."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        own = {char: ord(char) for char in alphabet if ord(char) < 256}
        others = sorted(set(range(256)) - set(own.values()))
        return own | dict(zip((char for char in alphabet if ord(char) >= 256), others))


class TextStream(Protocol):
    """Text of a growing sequence: `step`s and one `flush` concatenate to its decoded text."""

    def step(self, token_id: int) -> str:
        """Text that is settled with this token, whatever comes after."""

    def flush(self) -> str:
        """The rest, now that nothing comes after."""


class _ByteLevelStream:
    """Bytes of tokens through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        token = self._tokenizer.shown_token(token_id)
        return "" if token is None else self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """Decodes new tokens behind the last one that has text.

    The decoders here work token by token, except that the first one of a sequence is special
    (hence the context) and that a run of byte tokens becomes characters as a whole, or all of it
    replacement characters if any byte is wrong: so a run is held until it ends.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        token = self._tokenizer.shown_token(token_id)
        if token is None:
            return ""
        self._pending.append(token_id)
        return "" if _BYTE_TOKEN.fullmatch(token) else self.flush()

    def flush(self) -> str:
        window = self._context + self._pending
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(window)
        assert text.startswith(before), f"decoding is not local: {before!r} became {text!r}"
        # Behind a token with text no token is the first; one without may leave that to the next.
        self._context = window[-1:] if self._tokenizer.decode(window[-1:]) else window
        self._pending = []
        return text[len(before) :]


@dataclass(frozen=True)
class TextStep:
    """What some output tokens added to a request's text."""

    text: str  # may be shown now
    stop: str | None  # the stop string that ended the text; it is not part of it
    num_kept: int  # tokens of this push up to the one that completed the stop string, or all


class OutputText:
    """The text of one request's output tokens, as they come.

    Held back are characters whose bytes are incomplete and text that may begin a stop string. The
    first stop string that is complete ends the text (of several ending at one character, the
    longest), unless it ends within the text of the first min_tokens tokens. The texts of all
    steps concatenate to the decoding of all kept tokens, cut before the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._stream = tokenizer.text_stream()
        self._stops = StopStrings(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._ended = False

    def push(self, token_ids: Sequence[int]) -> TextStep:
        """Add output tokens; none may follow a stop string or `finish`."""
        assert not self._ended, "the text has ended"
        parts = []
        for kept, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            parts.append(self._show(self._stream.step(token_id)))
            if self._stops.matched is not None:
                self._ended = True
                return TextStep("".join(parts), self._stops.matched, kept)
        return TextStep("".join(parts), None, len(token_ids))

    def finish(self) -> TextStep:
        """No more tokens: what was held back, which may still complete a stop string."""
        assert not self._ended, "the text has ended"
        self._ended = True
        text = self._show(self._stream.flush())
        if self._stops.matched is None:
            text += self._stops.flush()
        return TextStep(text, self._stops.matched, 0)

    def _show(self, text: str) -> str:
        return self._stops.feed(text, may_match=self._num_tokens > self._min_tokens)


def _decoders(decoder: dict[str, Any] | None) -> list[str]:
    """Types of a decoder and of those in it; a Strip at the end of texts is named `StripRight`."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [name for part in decoder["decoders"] for name in _decoders(part)]
    return ["StripRight" if decoder.get("stop", 0) else str(decoder["type"])]


def _local(decoders: list[str]) -> bool:
    """Whether a token's text depends on no more than its place and its run of byte tokens."""
    fused = decoders.index("Fuse") if "Fuse" in decoders else len(decoders)
    return _PER_TOKEN.issuperset(decoders[:fused]) and {"Fuse", "Strip"}.issuperset(
        decoders[fused:]
    )

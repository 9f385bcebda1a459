"""Tokenizer: text to tokens and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import pre_tokenizers

from dp_runtime.errors import one_line, require, shown

_PER_TOKEN = {"Metaspace", "WordPiece", "BPEDecoder", "Replace", "ByteFallback", "Strip"}


class Tokenizer:
    """A tokenizer.json; ValueError if it can't be read, or its decoder's text can't be streamed."""

    def __init__(self, tokenizer_json: str) -> None:
        with _as_value_error("tokenizer.json: not a tokenizer"):
            self._tokenizer = HfTokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoders = _decoders(json.loads(tokenizer_json).get("decoder"))
        self.is_byte_level = decoders == ["ByteLevel"]
        require(
            self.is_byte_level or _local(decoders), "decoder of tokenizer.json", decoders,
            f"ByteLevel alone, or any of {', '.join(sorted(_PER_TOKEN))}, then Fuse and Strip",
        )  # fmt: skip
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {i: token.content for i, token in added.items() if token.special}
        self._special = frozenset(self.special_tokens.values())

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(
        self, text: str, add_special_tokens: bool = True, field: str = "prompt"
    ) -> list[int]:
        """Return the token ids of a text; ValueError, naming the field, if it has none."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{field}: {shown(text, 40)} is not allowed; {error}") from None
        with _as_value_error(f"{field}: {shown(text, 40)} is not allowed; tokenizer.json fails"):
            # A batch of one: `encode` would hold Python's lock, and with it every other thread.
            batch = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
            return list(batch[0].ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids that the tokenizer does not have are left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def shown_token(self, token_id: int, skip_special_tokens: bool = True) -> str | None:
        """Spell the token as the vocabulary does; None if it is unknown or skipped."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return None if skip_special_tokens and token in self._special else token

    def token_bytes(self, token: str) -> bytes:
        """Decode a token as the byte-level decoder does; one with other characters is literal."""
        try:
            return bytes(map(self._bytes.__getitem__, token))
        except KeyError:
            return token.encode()

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """Map the byte-level alphabet to bytes (OpenAI's GPT-2 encoder, 2019)."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        own = {char: ord(char) for char in alphabet if ord(char) < 256}
        others = sorted(set(range(256)) - set(own.values()))
        return own | dict(zip((char for char in alphabet if ord(char) >= 256), others))


@contextmanager
def _as_value_error(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise ValueError(one_line(f"{what}: {error}", 400)) from error


def _decoders(decoder: dict[str, Any] | None) -> list[str]:
    """List types of a decoder and those in it; a Strip at the end of texts is `StripRight`."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [name for part in decoder["decoders"] for name in _decoders(part)]
    return ["StripRight" if decoder.get("stop", 0) else str(decoder["type"])]


def _local(decoders: list[str]) -> bool:
    """Tell whether a token's text depends only on its place and its run of byte tokens."""
    fused = decoders.index("Fuse") if "Fuse" in decoders else len(decoders)
    return _PER_TOKEN.issuperset(decoders[:fused]) and {"Fuse", "Strip"}.issuperset(
        decoders[fused:]
    )

"""JsonExtent: where a JSON object in a stream of text ends."""

from __future__ import annotations

import re

_SPACE = re.compile(r"\s*")
_PLAIN = re.compile(r"[\s0-9A-Za-z+.:,-]*")  # between brackets and texts
_IN_TEXT = re.compile(r'[^"\\]*')


class JsonExtent:
    """Follows brackets and texts only: what is between them may not be JSON."""

    def __init__(self) -> None:
        self.ended = False
        self.failed = False  # at a character that JSON does not have there
        self._depth = 0
        self._in_text = self._escaped = False

    def scan(self, text: str) -> int:
        """Return how many characters belong to the object: all of them, until it ends or fails."""
        at = 0
        while at < len(text) and not self.ended and not self.failed:
            at = self._scan_text(text, at) if self._in_text else self._scan_brackets(text, at)
        return at

    def _scan_text(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        at = _end(_IN_TEXT, text, at)
        if at < len(text):
            self._escaped, self._in_text = text[at] == "\\", text[at] != '"'
        return at + 1

    def _scan_brackets(self, text: str, at: int) -> int:
        at = _end(_PLAIN if self._depth else _SPACE, text, at)
        match text[at : at + 1]:
            case "":
                return at
            case "{":
                self._depth += 1
            case "[" if self._depth:
                self._depth += 1
            case '"' if self._depth:
                self._in_text = True
            case "}" | "]" if self._depth:
                self._depth -= 1
                self.ended = self._depth == 0
            case _:
                self.failed = True
                return at
        return at + 1


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    assert found is not None, "the pattern matches nothing, too"
    return found.end()

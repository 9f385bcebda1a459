"""Stop strings in a text that comes piece by piece."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

_FIRST_MARK = 0xD800  # a surrogate stands for a special token: no decoded text has one
_MARK = re.compile("[\ud800-\udfff]")


class StopStrings:
    """Passes text on up to the first stop string, and holds back what may begin one.

    Special tokens that a stop string names are fed as their mark, a character that is never shown.
    Such a stop string is looked for twice: with marks, and as plain text, where marks are skipped.
    """

    def __init__(
        self, stops: Sequence[str], special_tokens: Collection[str] = (), include: bool = False
    ) -> None:
        self.matched: str | None = None
        self._include = include  # the stop string in the text
        named = [token for token in special_tokens if any(token in stop for stop in stops)]
        self.marks = {token: chr(_FIRST_MARK + i) for i, token in enumerate(named)}
        stop_of = {stop: stop for stop in stops}
        stop_of |= {_with_marks(stop, self.marks): stop for stop in stops if self.marks}
        self._automata = [_Automaton(pattern, stop) for pattern, stop in stop_of.items()]
        self._held = ""

    def feed(self, text: str, may_match: bool) -> str:
        """Return the text that may be shown; stop strings that end here count if may_match."""
        assert self.matched is None, "no text after a stop string"
        if not self._automata:
            return text
        text = self._held + text
        for end in range(len(self._held) + 1, len(text) + 1):
            complete = [each for each in self._automata if each.advance(text[end - 1])]
            if complete and may_match:
                start, index = min(
                    (each.start(text[:end], len(each.pattern)), i)
                    for i, each in enumerate(complete)
                )
                self.matched = complete[index].stop
                return _without_marks(text[:start]) + self.matched * self._include
        start = min(each.start(text, each.num_followed) for each in self._automata)
        self._held = text[start:]
        return _without_marks(text[:start])

    def flush(self) -> str:
        text, self._held = self._held, ""
        return _without_marks(text)


class _Automaton:
    """Follows one pattern in constant time per character (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, pattern: str, stop: str) -> None:
        self.pattern = pattern
        self.stop = stop
        self.num_followed = 0  # this much of the pattern the text ends with
        self._borders = _borders(pattern)
        self._skips_marks = not _MARK.search(pattern)

    def advance(self, char: str) -> bool:  # whether the pattern is complete with it
        if self._skips_marks and _MARK.match(char):
            return False
        state = self.num_followed
        while state and self.pattern[state] != char:
            state = self._borders[state]
        if self.pattern[state] == char:
            state += 1
        complete = state == len(self.pattern)
        self.num_followed = self._borders[state] if complete else state
        return complete

    def start(self, text: str, length: int) -> int:
        """Find where the last `length` characters begin, skipped ones not counted."""
        if not self._skips_marks or not _MARK.search(text):
            return len(text) - length
        followed = [index for index, char in enumerate(text) if not _MARK.match(char)]
        return followed[-length] if length else len(text)


def _with_marks(stop: str, marks: Mapping[str, str]) -> str:
    longest_first = sorted(marks, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: marks[found[0]], stop)


def _without_marks(text: str) -> str:
    return _MARK.sub("", text)


@lru_cache(1024)  # n choices of a request have the same stop strings, and so have their clients'
def _borders(pattern: str) -> Sequence[int]:
    """borders[n]: length of the longest proper prefix of pattern[:n] that is also its suffix."""
    borders = [0, 0]
    size = 0
    for char in pattern[1:]:
        while size and pattern[size] != char:
            size = borders[size]
        if pattern[size] == char:
            size += 1
        borders.append(size)
    return borders

"""Stop strings in a text that comes piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, and holds back what may begin one.

    Each stop string is followed by its own automaton (Knuth, Morris and Pratt, 1977): constant
    time per character. Its state, how much of the string the text ends with, is what must be held.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stops = tuple(dict.fromkeys(stops))
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""

    def feed(self, text: str, may_match: bool) -> str:
        """Text that may be shown; stop strings count if they end here and may_match is set."""
        assert self.matched is None, "no text after a stop string"
        if not self._stops:
            return text
        text = self._held + text
        for end in range(len(self._held) + 1, len(text) + 1):
            complete = self._advance(text[end - 1])
            if complete and may_match:
                self.matched = max(complete, key=len)
                return text[: end - len(self.matched)]
        shown = len(text) - max(self._states)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What is held, now that nothing comes after."""
        text, self._held = self._held, ""
        return text

    def _advance(self, char: str) -> list[str]:
        """Follow one character; returns the stop strings that are complete with it."""
        complete = []
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders)):
            state = self._states[i]
            while state and stop[state] != char:
                state = borders[state]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                complete.append(stop)
                state = borders[state]
            self._states[i] = state
        return complete


def _borders(pattern: str) -> list[int]:
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

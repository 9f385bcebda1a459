"""What Ray tells of a failure, as one line that names the cause."""

from __future__ import annotations

import re

MAX_CAUSE = 500  # characters
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CHAINED = re.compile(r"\n\n(?:The above exception was the direct|During handling of the above)")
_SAYS_NOTHING = "The actor died unexpectedly before finishing this task."
_EXCEPTION = re.compile(
    r"(?:[A-Za-z_][\w]*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b(?:: |$)"
)


def cause_of(error: BaseException) -> str:
    """Return the innermost cause of what Ray raised, in one line."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        return cause_in(error.traceback_str)
    return cause_in(str(error) or type(error).__name__)


def plain(error: BaseException) -> str:
    """Return the whole text without codes for colours."""
    return _COLOURS.sub("", str(error)).strip()


def cause_in(text: str) -> str:
    """Return the innermost cause in Ray's text, in which tracebacks are embedded.

    Python prints the cause of a chain first. Without a traceback it is all lines but the fields
    that Ray indents.
    """
    text = _COLOURS.sub("", text).strip()
    if "Traceback (most recent call last)" in text:
        first = _CHAINED.split(text)[0]
        lines = [line.strip() for line in first.splitlines()]
        if found := [line for line in lines if _EXCEPTION.match(line)]:
            return _bounded(found[-1])
    lines = [line for line in text.splitlines() if not line.startswith("\t")]
    lines = [line for line in lines if line != _SAYS_NOTHING] or lines
    return _bounded(" ".join(lines).split(" Some common causes include:")[0])


def _bounded(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_CAUSE else f"{line[: MAX_CAUSE - 3]}..."

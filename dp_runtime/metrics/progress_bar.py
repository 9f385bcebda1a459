"""Progress of long work on stderr: a bar on a terminal, else one line every few seconds."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 5.0


class ProgressBar:
    """Shows how much of `total` is done; shows nothing if not `enabled`."""

    def __init__(self, title: str, total: int, unit: str, enabled: bool = True) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._lines = enabled and not sys.stderr.isatty()
        bar = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=title, unit=unit, unit_scale=True) if bar else None
        self._last_line = monotonic()
        self._note = ""

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show that `done` of the total are done, and a note on what else goes on."""
        self._total = self._total if total is None else total
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.update(done - self._bar.n)
            if note != self._note:
                self._bar.set_postfix_str(note)
                self._note = note
        elif self._lines and monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = monotonic()
            counted = f"{done} of {self._total} {self._unit}s"
            print(f"{self._title}: {', '.join(filter(None, (counted, note)))}", file=sys.stderr)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

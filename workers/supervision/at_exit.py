"""Closes what was not closed when the interpreter ends."""

from __future__ import annotations

import atexit
from typing import Protocol
from weakref import WeakSet


class Closable(Protocol):
    @property
    def belongs_here(self) -> bool:
        """This process is the one that made it, and no forked child."""

    def close_now(self) -> None:
        """End it in this thread."""


_open: WeakSet[Closable] = WeakSet()


def close_at_exit(group: Closable) -> None:
    _open.add(group)


def _close_all() -> None:
    for group in list(_open):
        if group.belongs_here:
            group.close_now()


atexit.register(_close_all)

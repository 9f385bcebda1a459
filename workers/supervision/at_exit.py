"""Closes what was not closed when the interpreter ends."""

from __future__ import annotations

import atexit
from typing import Protocol
from weakref import WeakSet


class Closable(Protocol):
    @property
    def belongs_here(self) -> bool: ...  # False in a forked child

    def close_now(self) -> None: ...  # in this thread


_open: WeakSet[Closable] = WeakSet()


def close_at_exit(group: Closable) -> None:
    _open.add(group)


def _close_all() -> None:
    for group in list(_open):
        if group.belongs_here:
            group.close_now()


atexit.register(_close_all)

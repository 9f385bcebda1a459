"""Ranks live as long as their engine is held, and in the process that started them."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from dp_runtime.engine.deadlines import Deadlines
from dp_runtime.engine.rank_group import RankGroup
from dp_runtime.errors import EngineClosed


class EngineInChild(EngineClosed):
    """An engine was used in a forked child of the process that it belongs to."""


class Disownable(Protocol):
    def disown(self, error: EngineInChild) -> None:
        """Refuse all use from now on, without a lock that a thread may have held at the fork."""


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Call the method without keeping its object alive; once that is gone a call does nothing."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> Any:
        bound = reference()
        return None if bound is None else bound(*arguments)

    return call


def bind_lifetime(engine: Disownable, group: RankGroup, deadlines: Deadlines) -> None:
    """Close the group once nobody holds the engine, and disown the engine in forked children."""
    weakref.finalize(engine, deadlines.close).atexit = False
    weakref.finalize(engine, _close_later, group).atexit = False  # the group sees to the exit
    _engines.add(engine)


def _close_later(group: RankGroup) -> None:
    """Close the ranks in a thread: whoever lets go of the last reference must not wait."""
    threading.Thread(target=group.close, name="close-engine", daemon=True).start()


_engines: weakref.WeakSet[Disownable] = weakref.WeakSet()


def _disown_all() -> None:
    engines = list(_engines)
    _engines.clear()
    for engine in engines:
        owner = os.getppid()
        text = f"the engine belongs to process {owner}: a forked child can not use it"
        engine.disown(EngineInChild(text))


os.register_at_fork(after_in_child=_disown_all)

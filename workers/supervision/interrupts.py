"""Work that an interrupt asks to end early, and never ends halfway."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait


def uninterrupted(work: Callable[[], None], on_interrupt: Callable[[], None]) -> None:
    """Do the work in a thread; interrupts call on_interrupt, and the first is raised at the end."""
    ended: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=run, name="uninterrupted", daemon=True).start()
    interrupt: BaseException | None = None
    while not ended.done():
        try:
            if interrupt is not None:
                on_interrupt()
            wait([ended])
        except BaseException as error:  # also what comes during on_interrupt()
            interrupt = interrupt or error
    if interrupt is not None:
        raise interrupt
    ended.result()

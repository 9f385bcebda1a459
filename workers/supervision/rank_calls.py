"""RankHandle: how the driver reaches one rank, and calls to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Protocol, TypeVar

from collectives.awake_clock import LOOK_EVERY_S, Deadline
from workers.messages import Message
from workers.start_errors import raise_failures

Answer = TypeVar("Answer")
SAME_TROUBLE_S = 1.0  # for ranks with the same trouble to be named together


class RankHandle(Protocol):
    dp_rank: int

    def call(self, message: Message[Answer]) -> Future[Answer]:
        """Send a message; its answer, or RankFailed if the rank's process ends first."""

    def kill(self) -> None:
        """End the rank at once; callable more than once."""


def call_all(
    handles: Sequence[RankHandle],
    message: Message[Answer],
    deadline: Deadline,
    meanwhile: Callable[[], None] = lambda: None,  # may raise
) -> list[Answer]:
    """Send a message to ranks; the first failures are one error that names the ranks."""
    futures = [handle.call(message) for handle in handles]
    while not all(future.done() for future in futures) and deadline.left() > 0:
        done, _ = wait(futures, LOOK_EVERY_S, FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            wait(futures, SAME_TROUBLE_S)
            break
        meanwhile()
    raise_failures(message.name, futures)
    return [future.result() for future in futures]

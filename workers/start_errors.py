"""The errors of several ranks as one, with equal ones named once."""

from __future__ import annotations

import errno
import resource
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dp_runtime.errors import RankFailed, StartError

_THREADS = (
    "raise the limit of processes and threads (ulimit -u, or the pids limit of the container), or "
    "lower dp_size"
)
_WRITABLE = "set TMPDIR, and with Ray RAY_TMPDIR, to a directory that can be written to"


@dataclass(frozen=True)
class Failure:
    kind: type[BaseException]
    text: str
    dp_ranks: tuple[int, ...]

    def named(self, num_ranks: int, text: str) -> str:
        """Put the ranks before a text; an error that all of them have is no rank's own."""
        if len(self.dp_ranks) == num_ranks:
            return text
        return f"rank {', '.join(map(str, self.dp_ranks))}: {text}"


def explained(error: BaseException) -> str:
    """Return an error's text, and the remedy if it is one of the machine's limits."""
    remedies = {
        errno.EMFILE: f"raise the limit of open files (ulimit -n), now {_soft_limit('NOFILE')}",
        errno.ENFILE: "the machine has too many open files",
        errno.EAGAIN: _THREADS,
        errno.ENOMEM: "the machine, or its container, is out of memory",
        errno.ENOSPC: "free some space there, or set TMPDIR",
    } | dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _WRITABLE)
    text = str(error) or type(error).__name__
    if isinstance(error, OSError):
        remedy = remedies.get(error.errno or 0, "")
        remedy = _WRITABLE if "temporary directory" in text else remedy
    else:
        remedy = _THREADS if "start new thread" in text else ""
    return f"{text}; {remedy}" if remedy else text


def _soft_limit(name: str) -> int:
    return resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0]


def raise_failures(step: str, futures: Mapping[int, Future[Any]]) -> None:
    """Raise one error for the ranks that failed or are late; ValueError if it is a mistake.

    futures: by dp_rank.
    """
    failures, num_ranks = failures_of(futures), len(futures)
    mistakes = [one for one in failures if issubclass(one.kind, ValueError)]
    if mistakes:
        raise ValueError("; ".join(one.named(num_ranks, one.text) for one in mistakes))
    if any(one.kind in (StartError, RankFailed) for one in failures):
        raise StartError("; ".join(one.text for one in failures))  # such texts name their rank
    if failures:
        texts = (one.named(num_ranks, f"{one.kind.__name__}: {one.text}") for one in failures)
        raise StartError("; ".join(texts))
    late = [rank for rank, future in futures.items() if not future.done()]
    if late:
        raise StartError(f"ranks {late} did not finish {step!r} in time")


def failures_of(futures: Mapping[int, Future[Any]]) -> list[Failure]:
    """Return the errors of the futures that are done, in the order of their first ranks."""
    ranks: dict[tuple[type[BaseException], str], tuple[int, ...]] = {}
    for rank, future in futures.items():
        error = future.exception() if future.done() else None
        if error is not None:
            key = (type(error), explained(error))
            ranks[key] = (*ranks.get(key, ()), rank)
    return [Failure(kind, text, who) for (kind, text), who in ranks.items()]

"""The actor of a rank."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from collectives.session import session_token
from dp_runtime.core.membership import Membership
from dp_runtime.errors import require
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.snapshot import RankSnapshot
from workers.messages import ConcurrencyGroup, HostInfo
from workers.ray_cluster.cluster_metrics import ClusterMetrics
from workers.worker import Worker


class RayWorker(Worker):
    """A Worker on a host that may not be the driver's."""

    def prepare(self, members: Membership | None = None) -> HostInfo:
        check_directories(
            {
                "model": self.config.model,
                "speculative_draft_model": self.config.speculative_draft_model,
            }
        )
        return super().prepare(members)

    def export_metrics(self, requests: RequestTotals) -> None:
        self._metrics.export(RankSnapshot(True, self.health(), self.totals(), requests))

    @cached_property
    def _metrics(self) -> ClusterMetrics:
        return ClusterMetrics(Path(self.config.model).name)


def check_directories(directories: Mapping[str, str | None]) -> None:
    """Raise ValueError that says where this rank looked for a directory, and as whom."""
    for name, directory in directories.items():
        try:
            found = directory is None or os.path.isdir(directory)
        except ValueError:  # a zero byte
            found = False
        allowed = (
            f"an existing directory; the ranks looked for it on host {socket.gethostname()}, "
            f"in {_working_directory()}, as user {_user()}"
        )
        require(found, name, directory, allowed)


def actor_class() -> Any:
    """Make a class, pickled by value, that imports nothing of ours before its path is set.

    Ray Client has no options of calls, so each group of messages is a method.
    """
    import ray

    class Rank:
        def __init__(self, first: list[str], unwanted: list[str], worker: bytes) -> None:
            import os
            import pickle
            import signal
            import sys

            sys.path[:] = first + [entry for entry in sys.path if entry not in unwanted]
            # Ray leaves SIGINT blocked, as a Ctrl-C of the driver's terminal is none of its
            # workers': they have a process group each.
            if os.getpgrp() == os.getpid():
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            make, arguments = pickle.loads(worker)
            self.worker = make(*arguments)

    def method(group: ConcurrencyGroup) -> Any:
        def answer(self: Any, message: Any) -> Any:
            return self.worker.answer(message)

        return ray.method(concurrency_group=group.value)(answer)

    title = f"Rank_{session_token()}"  # how `ps` shows the actor's process
    methods = {group.value: method(group) for group in ConcurrencyGroup}
    return ray.remote(concurrency_groups=dict.fromkeys(methods, 1))(type(title, (Rank,), methods))


def search_path(same_host: bool) -> tuple[list[str], list[str]]:
    """Return what a rank searches first, as its driver does if on one host, and must not search."""
    # Ray has all workers search the driver's working directory, which the driver may not do itself.
    here = os.getcwd()
    driver = [os.path.abspath(entry) for entry in sys.path]
    return (driver if same_host else []), ([] if here in driver else [here])


def _working_directory() -> str:
    with suppress(OSError):
        return os.getcwd()
    return "a working directory that is gone"


def _user() -> str:
    with suppress(KeyError, OSError):
        return getpass.getuser()
    return str(os.getuid())

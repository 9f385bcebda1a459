"""What travels between the driver and its ranks, besides the runtime's own request types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dp_runtime.core.request import RequestUpdate

# Calls of one lane run one after the other, in their order; lanes run beside each other.
CONCURRENCY_GROUPS = {
    "prepare": "control",
    "load": "control",
    "serve": "control",
    "submit": "control",
    "abort": "control",
    "abandon": "control",
    "stop": "control",
    "poll": "outputs",
    "health": "status",
    "trace": "status",
    "totals": "status",
}


@dataclass(frozen=True)
class HostInfo:
    """Where a rank's process runs; sent by the rank before it joins the others."""

    dp_rank: int
    host: str
    address: str
    free_port: int
    shared_directory: str  # for files that ranks of one host map


ONE_HOST = ("shared_memory", "peer_to_peer")  # collectives whose ranks share a host's memory


@dataclass(frozen=True)
class MeetingPoint:
    """Where the ranks meet: a directory, an URL (torch_distributed), or an object (in_process).

    `group` is the in-process group of the thread launcher; it never leaves the process.
    """

    kind: str
    address: str
    group: Any = None

    @property
    def in_host_memory(self) -> bool:
        """The address is a directory that the last rank removes."""
        return self.kind in ONE_HOST


@dataclass(frozen=True)
class Polled:
    """What a rank did since the last poll; `error` says why it stopped serving."""

    progress: Sequence[RequestUpdate]
    error: str | None = None


@dataclass(frozen=True)
class Call:
    """A method call, for a rank that is a plain process."""

    call_id: int
    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Reply:
    """The result of a call, or the exception it raised."""

    call_id: int
    value: Any
    error: BaseException | None

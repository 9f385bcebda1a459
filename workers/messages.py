"""Messages between the driver and its ranks, besides the runtime's own request types."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, ClassVar, Generic, TypeVar

from collectives.in_process import InProcessGroup
from dp_runtime.core.membership import Membership
from dp_runtime.core.rank_events.kv_events import KvEvent
from dp_runtime.core.rank_events.rank_load import RankLoad
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.host.memory_address import MemoryAddress
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.snapshot import RankMetrics
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.totals import Totals
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.parallel.transports import IN_PROCESS, TRANSPORTS

Answer = TypeVar("Answer", covariant=True)
JOIN_S = 60.0
NO_RANK = -1  # the number of a standby, before it takes a seat


def named(dp_rank: int) -> str:
    return "a standby" if dp_rank == NO_RANK else f"rank {dp_rank}"


class ConcurrencyGroup(StrEnum):
    """Messages of one group are answered one after the other, groups beside each other."""

    CONTROL = "control"
    OUTPUTS = "outputs"
    STATUS = "status"


@dataclass(frozen=True)
class HostInfo:
    dp_rank: int
    host: str
    flight: MemoryAddress | None = None  # where other processes of the host find its flight ring
    gpu: str = ""  # the UUID of its GPU


@dataclass(frozen=True)
class Rendezvous:
    transport: str
    address: str  # a directory of their host, or tcp://host:port (torch_distributed)
    secret: str = field(default="", repr=False)  # hex; opens the ranks' connections

    @property
    def in_host_memory(self) -> bool:  # the address is a directory that the last rank removes
        return not TRANSPORTS[self.transport].spans_hosts


@dataclass(frozen=True, eq=False)
class InProcessRendezvous:
    """The group of ranks that are threads of this process; it never leaves the process."""

    transport: ClassVar[str] = IN_PROCESS.name
    group: InProcessGroup


AnyRendezvous = Rendezvous | InProcessRendezvous


class Blame(Enum):
    """Whose fault ended the steps of a rank, as far as the rank can tell."""

    RANK = "rank"  # its own
    REQUEST = "request"  # one of its requests, which has ended
    POLICY = "policy"  # a policy of the user's own, which all ranks have
    NOBODY = "nobody"  # others ended the step, or nobody knows


@dataclass(frozen=True)
class Polled:
    """A rank's output since the last poll; `error` says why it stopped serving."""

    progress: Sequence[RequestUpdate]
    error: str | None = None
    at_fault: bool = False  # the error is the rank's own: others did not end its step
    kv_events: Sequence[KvEvent] = ()
    load: RankLoad | None = None  # None: it has loaded nothing


# Messages to a rank; Worker.answer says what each does.


class Message(Generic[Answer]):
    """A message to a rank, which answers with an Answer or an exception."""

    group: ClassVar[ConcurrencyGroup] = ConcurrencyGroup.CONTROL

    @property
    def name(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Prepare(Message[HostInfo]):
    """Check the model against the config, before anything is loaded."""

    members: Membership | None = None  # of the epoch that it will join; None: those of the start


@dataclass(frozen=True)
class Warm(Message[str]):
    pass  # to a standby: be ready for any rank's number; the answer is the host


@dataclass(frozen=True)
class TakeSeat(Message[None]):
    """To a standby: be this rank from now on, on GPUs on the one with this UUID."""

    dp_rank: int
    gpu: str


@dataclass(frozen=True)
class Load(Message[ModelInfo]):
    copies: Mapping[int, MemoryAddress] = field(default_factory=dict)  # by dp_rank


@dataclass(frozen=True)
class CheckPlan(Message[None]):
    """Find out whether the rank could serve as one of these; nothing changes."""

    members: Membership


@dataclass(frozen=True)
class Reshard(Message[HostInfo]):
    """Of a rank that is suspended: load the experts of its position among these."""

    members: Membership


@dataclass(frozen=True)
class OpenRendezvous(Message[Rendezvous]):
    transport: str
    one_host: bool


@dataclass(frozen=True)
class Join(Message[None]):
    rendezvous: AnyRendezvous
    epoch: int
    timeout_s: float = JOIN_S  # for all ranks to come there


@dataclass(frozen=True)
class Suspend(Message[bool]):
    """Abandon the step and leave the others, but keep requests, pages and outputs.

    Answers whether the reason was a request of this rank, which has ended.
    """

    reason: str


@dataclass(frozen=True)
class Submit(Message[None]):
    requests: Sequence[RankRequest]


@dataclass(frozen=True)
class Abort(Message[None]):
    request_ids: Sequence[int]


@dataclass(frozen=True)
class Recall(Message[None]):
    """Give back requests that have not begun; an update of each says if it is given back."""

    request_ids: Sequence[int]


@dataclass(frozen=True)
class Abandon(Message[None]):
    """Leave the step at once and free the ranks that wait in it."""

    group: ClassVar[ConcurrencyGroup] = ConcurrencyGroup.STATUS  # a join may be under way
    reason: str
    epoch: int | None = None  # the one that it is about: it may come when the next has begun


@dataclass(frozen=True)
class Stop(Message[None]):
    pass


@dataclass(frozen=True)
class Poll(Message[Polled]):
    group: ClassVar[ConcurrencyGroup] = ConcurrencyGroup.OUTPUTS
    timeout_s: float


@dataclass(frozen=True)
class ReadHealth(Message[RankHealth]):
    group: ClassVar[ConcurrencyGroup] = ConcurrencyGroup.STATUS


@dataclass(frozen=True)
class ReadTrace(Message[tuple[StepTrace, ...]]):
    group: ClassVar[ConcurrencyGroup] = ConcurrencyGroup.STATUS


@dataclass(frozen=True)
class ReadFlight(Message[bytes]):
    """A copy of the rank's flight ring, also while its step hangs."""

    group: ClassVar[ConcurrencyGroup] = ConcurrencyGroup.STATUS


@dataclass(frozen=True)
class ReadTotals(Message[Totals]):
    group: ClassVar[ConcurrencyGroup] = ConcurrencyGroup.STATUS


@dataclass(frozen=True)
class ReadMetrics(Message[RankMetrics]):
    group: ClassVar[ConcurrencyGroup] = ConcurrencyGroup.STATUS


@dataclass(frozen=True)
class ExportMetrics(Message[None]):
    """Give the cluster, which can be asked for them, the rank's metrics and those of the driver."""

    group: ClassVar[ConcurrencyGroup] = ConcurrencyGroup.STATUS
    requests: RequestTotals


# Frames between the driver and a rank that is a plain process. Contents are pickled on their own:
# what can not be read concerns one call, and not the connection.


@dataclass(frozen=True)
class Call:
    call_id: int
    content: bytes

    @classmethod
    def with_message(cls, call_id: int, message: Message[Any]) -> Call:
        return cls(call_id, pickle.dumps(message))

    @property
    def message(self) -> Message[Any]:
        message: Message[Any] = pickle.loads(self.content)
        return message


@dataclass(frozen=True)
class Reply:
    """The answer to a call, or the exception it raised."""

    call_id: int
    content: bytes

    @classmethod
    def with_answer(cls, call_id: int, value: Any, error: BaseException | None) -> Reply:
        """Pickle an answer; an error that does not survive this becomes one with its text."""
        try:
            content = pickle.dumps((value, error))
            pickle.loads(content) if error is not None else None
        except Exception as unreadable:
            cause = error or unreadable
            text = RuntimeError(f"{type(cause).__name__}: {cause}")
            content = pickle.dumps((None, text))
        return cls(call_id, content)

    @property
    def answer(self) -> tuple[Any, BaseException | None]:
        value, error = pickle.loads(self.content)
        return value, error

"""Epochs: how ranks come together, at the start and after a fault."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from collectives.awake_clock import Deadline
from collectives.shared_memory.rendezvous import remove_rendezvous
from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.metrics.status import ModelInfo
from workers.communicators import transport_of, where
from workers.messages import (
    AnyRendezvous,
    CheckPlan,
    HostInfo,
    Join,
    Load,
    Message,
    OpenRendezvous,
    Prepare,
    Rendezvous,
    Reshard,
)
from workers.ranks import Ranks, Seat
from workers.standby.host_copies import HostCopies

_log = logging.getLogger(__name__)


WhyNot = Callable[[], str]


def show_nothing() -> None: ...


def no_reason() -> str:
    return ""


class Epochs:
    """Prepares and loads ranks, and has all of them join each new epoch.

    `why_not` says why none of this is waited for any more, `doomed` why this attempt is not.
    """

    def __init__(
        self,
        config: EngineConfig,
        ranks: Ranks,
        why_not: WhyNot,
        on_prepared: Callable[[Mapping[int, HostInfo]], None],
    ) -> None:
        self._config, self._ranks, self._why_not = config, ranks, why_not
        self._on_prepared = on_prepared
        self._sharded: dict[int, Membership] = {}  # among whom each rank has loaded its experts
        self._copies = HostCopies(config.host_weights)
        self._meeting: AnyRendezvous | None = None
        self.number = -1

    def prepare(
        self,
        seats: Sequence[Seat],
        deadline: Deadline,
        doomed: WhyNot = no_reason,
        members: Membership | None = None,
    ) -> None:
        members = members or self._ranks.members
        self._take(seats, members, Prepare(members), deadline, doomed)

    def check(self, members: Membership, deadline: Deadline) -> None:
        """ValueError if ranks that serve could not go on as these."""
        staying = [seat for seat in self._ranks.seats if seat.dp_rank in members]
        self._ranks.all(CheckPlan(members), deadline, seats=staying, why_not=self._why_not)

    def check_hosts(self, seats: Sequence[Seat]) -> None:
        """ValueError if these, all of whom are prepared, can not meet."""
        transport_of(self._config, _hosts_of(seats))

    def _take(
        self,
        seats: Sequence[Seat],
        members: Membership,
        message: Message[HostInfo],
        deadline: Deadline,
        doomed: WhyNot = no_reason,
    ) -> None:
        why_not = self._or(doomed)
        hosts = self._ranks.all(message, deadline, seats=seats, why_not=why_not)
        for seat, host in zip(seats, hosts, strict=True):
            seat.host, seat.answered = host, True
        found = {seat.dp_rank: host for seat, host in zip(seats, hosts, strict=True)}
        self._sharded |= dict.fromkeys(found, members)
        self._on_prepared(found)

    def load(
        self,
        seats: Sequence[Seat],
        deadline: Deadline,
        show: Callable[[], None] = show_nothing,
        doomed: WhyNot = no_reason,
    ) -> list[ModelInfo]:
        why_not = self._or(doomed)
        dp_ranks = [seat.dp_rank for seat in seats]
        copies = self._copies.addresses(dp_ranks, self._sharded[dp_ranks[0]])
        return self._ranks.all(Load(copies), deadline, show, seats, why_not)

    def begin(
        self,
        deadline: Deadline,
        timeout_s: float,
        show: Callable[[], None] = show_nothing,
        doomed: WhyNot = no_reason,
    ) -> None:
        """Have all ranks join the next epoch, where nobody of the last one can be."""
        self.number += 1
        why_not = self._or(doomed)
        members = self._ranks.members
        others = [seat for seat in self._ranks.seats if self._sharded[seat.dp_rank] != members]
        if others:
            self._take(others, members, Reshard(members), deadline, doomed)
        self._meeting = self._ranks.launcher.meeting(members) or self._open(deadline, why_not)
        join = Join(self._meeting, self.number, timeout_s)
        try:
            self._ranks.all(join, deadline, show, why_not=why_not)
        except BaseException:
            self.forget_meeting()
            raise

    def end(self) -> None:
        self.forget_meeting()
        self._copies.close()

    def _or(self, doomed: WhyNot) -> WhyNot:
        return lambda: self._why_not() or doomed()

    def forget_meeting(self) -> None:
        """Remove what a rank that was killed as it attached could not."""
        meeting = self._meeting
        if isinstance(meeting, Rendezvous) and meeting.in_host_memory:
            remove_rendezvous(meeting.address)

    def _open(self, deadline: Deadline, why_not: WhyNot) -> Rendezvous:
        hosts = _hosts_of(self._ranks.seats)
        one_host = len({host.host for host in hosts}) == 1
        opening = OpenRendezvous(transport_of(self._config, hosts).name, one_host)
        first = self._ranks.seats[:1]
        (meeting,) = self._ranks.all(opening, deadline, seats=first, why_not=why_not)
        _log.info("epoch %d: ranks on %s meet over %s at %s", self.number, *where(hosts, meeting))
        return meeting


def _hosts_of(seats: Sequence[Seat]) -> list[HostInfo]:
    return [seat.host for seat in seats if seat.host is not None]

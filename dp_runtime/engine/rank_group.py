"""RankGroup: the running ranks as the engine sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.core.rank_events.listeners import Listeners
from dp_runtime.core.request import RankRequest
from dp_runtime.errors import StartError
from dp_runtime.flight.record import FlightDump
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.snapshot import RankMetrics
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.totals import Totals
from dp_runtime.metrics.trace import StepTrace


class GroupMetrics(Protocol):
    """The metrics of all ranks; no call waits for a rank that hangs."""

    def read(self, timeout_s: float) -> tuple[tuple[RankMetrics, bool], ...]:
        """Return what each rank says, or last said, and whether it has answered in time."""

    def export(self, requests: Mapping[int, RequestTotals]) -> None:
        """Let ranks of a cluster give it their metrics, and the driver's of their requests."""


class RankGroup(Protocol):
    """The running ranks, whatever kind of process they are; only `change` and questions wait."""

    model: ModelInfo

    @property
    def metrics(self) -> GroupMetrics: ...

    @property
    def members(self) -> Membership: ...  # of the epoch

    @property
    def wanted(self) -> Membership: ...  # who is to serve: more, where others go on without some

    @property
    def num_standbys(self) -> int: ...  # warm processes that could take a lost rank's place

    def listen(self, listeners: Listeners) -> None:
        """Deliver outputs, transitions and the first failure from threads of the group."""

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None: ...

    def abort(self, dp_rank: int, request_ids: Sequence[int]) -> None: ...

    def recall(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        """Ask a rank to give back requests that it has not begun; updates say if it does."""

    def health(self, timeout_s: float) -> tuple[RankHealth, ...]:
        """Return the state of every rank, also of those that do not answer in time."""

    def change(self, target: Membership) -> None:
        """Have these ranks serve; ValueError or ResizeFailed if they can't, and nothing changes."""

    def trace(self) -> tuple[StepTrace, ...]: ...  # ordered by step and rank

    def flight_record(self) -> FlightDump:
        """Return the last steps of every rank, whether it answers or not."""

    def totals(self) -> tuple[Totals, ...]: ...

    def close(self) -> None:
        """Stop all ranks and release their processes; callable more than once."""


def start_ranks(
    config: EngineConfig,
    show_progress: bool,
    first: Mapping[int, Sequence[RankRequest]] | None = None,
) -> RankGroup:
    """Start ranks, which have their first requests before their first step."""
    _check_not_shadowed("workers", "collectives")
    from workers import start  # NOTE: the one import upward; ranks come to the engine this way

    return start(config, show_progress, first)


def _check_not_shadowed(*packages: str) -> None:
    """Raise StartError if Python finds another project's packages under the names of ours."""
    home = Path(__file__).parents[2]  # the directory that holds dp_runtime
    for name in packages:
        spec = find_spec(name)
        found = Path(spec.origin).parent if spec is not None and spec.origin else None
        if found is None or found.resolve() != (home / name).resolve():
            raise StartError(
                f"the package {name!r} that Python finds first is {found}, not that of dp-runtime "
                f"({home / name}): rename it, or start the program from another directory"
            )

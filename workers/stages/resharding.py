"""Unsharded: the stage of a rank between two shardings of the experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dp_runtime.core.membership import Membership
from dp_runtime.kernels.jit_build import allow_compilation
from dp_runtime.metrics.status import RankHealth
from dp_runtime.startup.build_rank import new_flight, reload_rank
from dp_runtime.startup.jit_modules import jit_modules_of
from dp_runtime.startup.loaded_rank import KeptCaches
from dp_runtime.startup.served_requests import ServedRequests
from dp_runtime.structured.compile_queue import CompileQueue
from workers.mailbox import Mailbox
from workers.stages.progress import StartProgress
from workers.stages.rank_stages import Loaded, Prepared


@dataclass(frozen=True, eq=False)
class Unsharded:
    """A rank that has let go of its weights, to load those of another position among others."""

    prepared: Prepared
    kept: KeptCaches
    requests: ServedRequests
    mailbox: Mailbox
    compiling: CompileQueue

    @classmethod
    def of(cls, loaded: Loaded) -> Unsharded:
        rank = loaded.rank
        kept = KeptCaches(rank.backends, rank.pools, rank.states, rank.info, rank.allocated_before)
        return cls(loaded.prepared, kept, loaded.requests, loaded.mailbox, loaded.compiling)

    def load(self, members: Membership, progress: StartProgress) -> Loaded:
        before = self.prepared
        plan = before.plan_among(members)
        prepared = replace(before, plan=plan, flight=new_flight(before.config, plan))
        allow_compilation()  # other shapes may want other kernels
        reload = lambda: reload_rank(before.config, plan, self.kept, progress.add_bytes)  # noqa: E731
        rank = progress.load(jit_modules_of(plan), prepared.device, reload)
        before.flight.ring.close()
        return Loaded(prepared, rank, self.requests, self.mailbox, self.compiling)

    def describe(self, health: RankHealth) -> RankHealth:
        return self.prepared.describe(health)

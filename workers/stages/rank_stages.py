"""The life of a rank as values: Prepared -> Loaded -> Connected -> Joined, and back to Loaded."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from socket import socket
from time import monotonic

import torch

from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.errors import (
    CollectiveAborted,
    PolicyFailed,
    RankFailed,
)
from dp_runtime.flight.recorder import FlightRecorder
from dp_runtime.host.memory_address import MemoryAddress
from dp_runtime.kernels.jit_build import forbid_compilation
from dp_runtime.metrics.memory import MemoryUse, RankMemory
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.runner.fault_injection import DueFaults, FaultyLaunch
from dp_runtime.runner.graphs.pending_capture import PendingCapture
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.startup.build_rank import (
    assemble,
    load_rank,
    new_flight,
)
from dp_runtime.startup.device_memory import free_garbage
from dp_runtime.startup.graph_capture import capture_all, plan_capture
from dp_runtime.startup.jit_modules import jit_modules_of
from dp_runtime.startup.loaded_rank import LoadedRank
from dp_runtime.startup.memory_profile import profile
from dp_runtime.startup.rank_plan import RankPlan, plan_rank, sketch_rank
from dp_runtime.startup.served_requests import ServedRequests
from dp_runtime.structured.compile_queue import CompileQueue
from workers.communicators import Communicator, FaultyCommunicator, connect
from workers.mailbox import Mailbox, blame_of
from workers.messages import AnyRendezvous, Blame
from workers.stages.progress import StartProgress

LEAVE_S = 5.0  # for a step to end


@dataclass(frozen=True, eq=False)
class Prepared:
    config: EngineConfig
    dp_rank: int
    plan: RankPlan
    flight: FlightRecorder  # of all epochs

    @classmethod
    def for_rank(
        cls, dp_rank: int, config: EngineConfig, device: str, members: Membership | None = None
    ) -> Prepared:
        """Check the model against the config (ValueError) and plan the rank's memory."""
        plan = plan_rank(config, dp_rank, device, members)
        return cls(config, dp_rank, plan, new_flight(config, plan))

    @property
    def device(self) -> torch.device:
        return torch.device(self.plan.device)

    @property
    def owns_process(self) -> bool:
        return self.config.launcher != "thread"

    def load(self, progress: StartProgress, copy: MemoryAddress | None = None) -> Loaded:
        load = lambda: load_rank(self.config, self.plan, progress.add_bytes, copy)  # noqa: E731
        rank = progress.load(jit_modules_of(self.plan), self.device, load)
        return Loaded.without_requests(self, rank)

    def plan_among(self, members: Membership) -> RankPlan:
        """Plan the same rank, with its pages, as one of these; ValueError if it does not fit."""
        config = replace(self.config, num_pages=self.plan.pages.num_pages)
        plan = sketch_rank(config, self.dp_rank, self.plan.device, members)
        if plan.shortage:
            raise ValueError(f"dp_size: {members.size} is not allowed; {plan.shortage}")
        return plan

    def describe(self, health: RankHealth) -> RankHealth:
        return replace(
            health,
            dp_size=self.plan.members.size,
            num_pages=self.plan.pages.num_pages,
            bytes_total=self.plan.load_bytes,
            memory=RankMemory(self.dp_rank, self.plan.memory, None),
        )


@dataclass(frozen=True, eq=False)
class Loaded:
    """A rank with weights, pages and kernels, which can join the others any number of times.

    Its requests and outputs stay while an epoch ends and the next begins.
    """

    prepared: Prepared
    rank: LoadedRank
    requests: ServedRequests
    mailbox: Mailbox
    compiling: CompileQueue

    @classmethod
    def without_requests(cls, prepared: Prepared, rank: LoadedRank) -> Loaded:
        requests = ServedRequests.none(prepared.plan, rank)
        return cls(prepared, rank, requests, Mailbox(), CompileQueue(requests.structured))

    def connect(
        self, rendezvous: AnyRendezvous, epoch: int, timeout_s: float, listener: socket | None
    ) -> Connected:
        prepared = self.prepared
        communicator = connect(
            rendezvous,
            prepared.dp_rank,
            prepared.config,
            prepared.device,
            timeout_s,
            listener,
            prepared.plan.members,
        )
        prepared.flight.join(epoch, rendezvous.transport)
        due = DueFaults(prepared.config.faults, prepared.dp_rank, epoch)
        if due:
            communicator = FaultyCommunicator(communicator, due)
        return Connected(self, communicator, epoch, due)

    def describe(self, health: RankHealth) -> RankHealth:
        health = self.prepared.describe(health)
        load = self.requests.load(self.mailbox.num_added + len(self.compiling))
        return replace(
            health,
            bytes_read=self.rank.info.bytes_read,
            load_s=self.rank.load_s,
            free_pages=load.free_pages,
            states=self.requests.scheduler.states.use,
            num_running=load.num_running,
            num_queued=load.num_waiting,
            error=self.mailbox.error or "",
        )


@dataclass(frozen=True, eq=False)
class Connected:
    """A loaded rank that has met the others; it does not step yet."""

    loaded: Loaded
    communicator: Communicator
    epoch: int
    due: DueFaults

    def begin(self, progress: StartProgress) -> Joined:
        """Begin to step; at the first start once memory is measured and graphs are captured.

        Both are events of all ranks. Graphs write to the communicator's buffers, so every epoch has
        its own; in later ones, whose requests wait, they are captured between the steps.
        """
        prepared, rank = self.loaded.prepared, self.loaded.rank
        config, plan = prepared.config, prepared.plan
        board, collective = self.communicator.board, self.communicator.collective
        served = self.loaded.requests
        if prepared.owns_process:
            free_garbage(plan.device)  # the last epoch's loop and graphs, before there are others
        loop = assemble(config, plan, rank, board, collective, prepared.flight, self.epoch, served)
        measures = prepared.device.type != "cpu" and self.epoch == 0
        measured = profile(loop, rank) if measures else None
        pending = plan_capture(plan, loop, progress.count_graphs) if plan.graphs else None
        if pending is not None and self.epoch > 0:
            loop.capture(pending)
        elif pending is not None:
            progress.state = RankState.CAPTURING
            capture_all(loop, pending)
        if prepared.owns_process and measures:
            forbid_compilation()  # in a later epoch a new rank builds kernels as they come
        if self.due:
            FaultyLaunch(loop, self.due)
        return Joined(self, loop, measured, pending)

    def abandon(self, reason: str) -> None:
        self.communicator.board.abort(reason)
        self.communicator.collective.abort(reason)

    def describe(self, health: RankHealth) -> RankHealth:
        return replace(self.loaded.describe(health), epoch=self.epoch)


class Joined:
    """A rank that steps with the others, in a thread of its own."""

    def __init__(
        self,
        connected: Connected,
        loop: StepLoop,
        measured: MemoryUse | None,
        capture: PendingCapture | None,
    ) -> None:
        self.connected, self.loop = connected, loop
        self._measured, self._capture = measured, capture
        self._dp_rank = connected.loaded.prepared.dp_rank
        self._thread = threading.Thread(
            target=self._run, name=f"dp-rank-{self._dp_rank}", daemon=True
        )
        self._thread.start()

    @property
    def requests(self) -> ServedRequests:
        return self.connected.loaded.requests

    @property
    def mailbox(self) -> Mailbox:
        return self.connected.loaded.mailbox

    def wake(self) -> None:
        self.connected.communicator.board.wake()

    def leave(self) -> Loaded:
        """Leave the step loop together with the other ranks, or without them after LEAVE_S."""
        self.mailbox.stop()
        self.wake()
        self._thread.join(LEAVE_S)
        if self._thread.is_alive():
            self.loop.coordinator.abort("it was told to stop")
            self._thread.join(LEAVE_S)
        loaded = self._disconnected()
        return Loaded.without_requests(loaded.prepared, loaded.rank)

    def suspend(self, reason: str) -> Loaded:
        """Leave the step where it is; RankFailed if it does not end, or a fault here ended it.

        PolicyFailed if one of the policies did.
        """
        self.connected.abandon(reason)
        self._thread.join(LEAVE_S)
        if self._thread.is_alive():
            raise RankFailed(f"rank {self._dp_rank} did not leave its step within {LEAVE_S:g} s")
        if self.mailbox.blame is Blame.POLICY:
            raise PolicyFailed(self.mailbox.error or "")
        if self.mailbox.blame is Blame.RANK:
            raise RankFailed(self.mailbox.error or "")
        loaded = self._disconnected()
        loaded.requests.abandon_steps()
        loaded.mailbox.recover()
        return loaded

    def _disconnected(self) -> Loaded:
        self.connected.communicator.close()
        return self.connected.loaded

    def describe(self, health: RankHealth) -> RankHealth:
        health, loop = self.connected.describe(health), self.loop
        step, since = loop.last_finished
        assert health.memory is not None, "a rank that has joined has a plan"
        return replace(
            health,
            state=self._state,
            last_step=step,
            last_step_age_s=monotonic() - since,
            graphs=self._capture.use if self._capture else None,
            memory=replace(health.memory, measured=self._measured),
        )

    @property
    def _state(self) -> RankState:
        if self.mailbox.error is not None:
            return RankState.FAILED
        if self.loop.is_capturing:
            return RankState.CAPTURING
        return RankState.IDLE if self.loop.idle.is_set() else RankState.RUNNING

    def _run(self) -> None:
        device = self.connected.loaded.prepared.device
        if device.type != "cpu":
            torch.cuda.set_device(device)
        try:
            self.loop.run(self.mailbox.take, self.mailbox.deliver)
        except CollectiveAborted as error:  # it says which rank ended the step, and why
            self.mailbox.fail(str(error), Blame.NOBODY)
        except PolicyFailed as error:
            self.mailbox.fail(f"rank {self._dp_rank}: {error}", Blame.POLICY)
        except BaseException as error:  # a panic of a library is no Exception
            text = f"rank {self._dp_rank}: {type(error).__name__}: {error}"
            self.mailbox.fail(text, blame_of(error))

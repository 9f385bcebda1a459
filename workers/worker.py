"""Worker: one DP rank as a plain class, in whatever stage of its life it is."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from time import sleep
from typing import Any

import torch

from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.core.request import RankRequest
from dp_runtime.errors import RankFailed
from dp_runtime.flight.recorder import FlightRecorder
from dp_runtime.flight.ring import wall_offset_ns
from dp_runtime.host.limits import usable_cpus
from dp_runtime.host.memory_address import MemoryAddress
from dp_runtime.metrics.log import log_to_stderr
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.snapshot import RankMetrics
from dp_runtime.metrics.status import ModelInfo, RankHealth, RankState
from dp_runtime.metrics.totals import Recorder, Totals
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.startup.device_memory import free_garbage
from dp_runtime.startup.devices import gpu_uuid, use_device
from workers.communicators import OpenedRendezvous, open_rendezvous
from workers.mailbox import Mailbox
from workers.messages import (
    JOIN_S,
    Abandon,
    Abort,
    AnyRendezvous,
    Blame,
    CheckPlan,
    ExportMetrics,
    HostInfo,
    Join,
    Load,
    Message,
    OpenRendezvous,
    Poll,
    Polled,
    Prepare,
    ReadFlight,
    ReadHealth,
    ReadMetrics,
    ReadTotals,
    ReadTrace,
    Recall,
    Rendezvous,
    Reshard,
    Stop,
    Submit,
    Suspend,
)
from workers.stages.progress import StartProgress
from workers.stages.rank_stages import Connected, Joined, Loaded, Prepared
from workers.stages.resharding import Unsharded
from workers.stages.stage import Stage, holder_of

LOADING_S = 0.1  # of whom has loaded nothing, until it is asked for its outputs again


class Worker:
    """One rank; `health`, `trace`, `flight`, `totals`, `abandon` are for any time and thread.

    Call `prepare`, `load` and `join` on all ranks, each once all have done the one before, and
    `join` again after `leave`.
    """

    def __init__(self, dp_rank: int, config: EngineConfig, device: str) -> None:
        self.dp_rank = dp_rank
        self.config = config
        self.device = device
        self._progress = StartProgress()
        self._stage: Stage | None = None
        self._flight: FlightRecorder | None = None
        self._opened: dict[str, OpenedRendezvous] = {}  # by address, until this rank joins there

    def answer(self, message: Message[Any]) -> Any:
        match message:
            case Prepare(members):
                return self.prepare(members)
            case Load(copies):
                return self.load(copies.get(self.dp_rank))
            case CheckPlan(members):
                return self.check_plan(members)
            case Reshard(members):
                return self.reshard(members)
            case OpenRendezvous(transport, one_host):
                return self.open_rendezvous(transport, one_host)
            case Join(rendezvous, epoch, timeout_s):
                return self.join(rendezvous, epoch, timeout_s)
            case Suspend(reason):
                return self.suspend(reason)
            case Submit(requests):
                return self.submit(requests)
            case Abort(request_ids):
                return self.abort(request_ids)
            case Recall(request_ids):
                return self.recall(request_ids)
            case Abandon(reason, epoch):
                return self.abandon(reason, epoch)
            case Stop():
                return self.stop()
            case Poll(timeout_s):
                return self.poll(timeout_s)
            case ReadHealth():
                return self.health()
            case ReadTrace():
                return self.trace()
            case ReadFlight():
                return self.flight()
            case ReadTotals():
                return self.totals()
            case ReadMetrics():
                return RankMetrics(self.health(), self.totals())
            case ExportMetrics(requests):
                return self.export_metrics(requests)
        raise AssertionError(f"no message to a rank: {message!r}")

    def prepare(self, members: Membership | None = None) -> HostInfo:
        if self.config.launcher != "thread":
            log_to_stderr(self.config.log_level, self.dp_rank)
            torch.set_num_threads(self.config.torch_threads or self._fair_threads())
        use_device(self.device)
        self._stage = prepared = Prepared.for_rank(self.dp_rank, self.config, self.device, members)
        return self._announce(prepared)

    def _announce(self, prepared: Prepared) -> HostInfo:
        self._flight = prepared.flight
        ring = prepared.flight.ring.address
        return HostInfo(self.dp_rank, socket.gethostname(), ring, gpu_uuid(self.device))

    def check_plan(self, members: Membership) -> None:
        """Look whether the rank could be one of these; ValueError if not. Nothing changes."""
        self._holder.prepared.plan_among(members)

    def reshard(self, members: Membership) -> HostInfo:
        """Load the experts of a position among others; pages and requests stay as they are."""
        assert isinstance(self._stage, Loaded), "suspend comes before reshard"
        self._stage = Unsharded.of(self._stage)
        if self.config.launcher != "thread":
            gc.unfreeze()
        free_garbage(self.device)
        self._stage = loaded = self._stage.load(members, self._progress)
        self._settle()
        return self._announce(loaded.prepared)

    def load(self, copy: MemoryAddress | None = None) -> ModelInfo:
        assert isinstance(self._stage, Prepared), "prepare comes before load"
        loaded = self._stage.load(self._progress, copy)
        self._stage = loaded
        self._settle()
        return loaded.rank.info

    def _settle(self) -> None:
        if self.config.launcher != "thread":
            gc.collect()
            gc.freeze()  # what is there by now stays: no step should walk over it, and no join

    def open_rendezvous(self, transport: str, one_host: bool) -> Rendezvous:
        opened = open_rendezvous(transport, one_host)
        self._opened[opened.rendezvous.address] = opened
        return opened.rendezvous

    def join(self, rendezvous: AnyRendezvous, epoch: int = 0, timeout_s: float = JOIN_S) -> None:
        loaded = self._stage
        assert isinstance(loaded, Loaded), "load comes before join, leave before joining again"
        opened = None
        if isinstance(rendezvous, Rendezvous):
            opened = self._opened.pop(rendezvous.address, None)
        listener = opened.listener if opened else None
        connected = loaded.connect(rendezvous, epoch, timeout_s, listener)
        self._stage = connected
        try:
            self._stage = connected.begin(self._progress)
        except BaseException:
            self._stage = loaded
            connected.communicator.close()
            raise

    def leave(self) -> None:
        if isinstance(self._stage, Joined):
            self._progress.state = RankState.READY
            self._stage = self._stage.leave()

    def suspend(self, reason: str) -> bool:
        match self._stage:
            case Joined() as joined:
                self._progress.state = RankState.READY
                self._stage = joined.suspend(reason)
                return self._mailbox.blame is Blame.REQUEST
            case Loaded():
                return False
        raise RankFailed(f"rank {self.dp_rank} has loaded nothing")

    def submit(self, requests: Sequence[RankRequest]) -> None:
        holder = self._holder
        for request in requests:
            if request.params.structured_outputs is None:
                holder.mailbox.submit([request])
            else:
                holder.compiling.put(request, partial(self._forward, holder.mailbox))
        self._wake()

    def abort(self, request_ids: Sequence[int]) -> None:
        """End requests before the next step; ids that are done are ignored."""
        self._holder.compiling.release(request_ids)
        self._holder.requests.structured.forget(request_ids)
        self._mailbox.abort(request_ids)
        self._wake()

    def recall(self, request_ids: Sequence[int]) -> None:
        """Have requests that have not begun given back before the next step."""
        self._mailbox.recall(request_ids)
        self._wake()

    def poll(self, timeout_s: float) -> Polled:
        if self._stage is None or isinstance(self._stage, Prepared):
            sleep(LOADING_S)
            return Polled([])
        holder = self._holder
        polled = holder.mailbox.poll(timeout_s)
        num_coming = holder.mailbox.num_added + len(holder.compiling)
        load, events = holder.requests.load(num_coming), holder.requests.take_kv_events()
        return replace(polled, load=load, kv_events=events)

    def health(self) -> RankHealth:
        health = RankHealth(
            self.dp_rank, RankState.STARTING, pid=os.getpid(), host=socket.gethostname(),
            clock_offset_ns=wall_offset_ns(),
        )  # fmt: skip
        stage, health = self._stage, self._progress.describe(health)
        return health if stage is None else stage.describe(health)

    def trace(self) -> tuple[StepTrace, ...]:
        recorder = self._recorder
        return () if recorder is None else tuple(recorder.steps)

    def flight(self) -> bytes:
        assert self._flight is not None, "prepare comes before flight"
        return self._flight.snapshot()

    def totals(self) -> Totals:
        recorder = self._recorder
        return Totals(self.dp_rank) if recorder is None else recorder.totals.copied()

    def export_metrics(self, requests: RequestTotals) -> None:
        raise AssertionError("only the ranks of a cluster have whom to give their metrics")

    def stop(self) -> None:
        self.leave()
        self._progress.state = RankState.STOPPED

    def abandon(self, reason: str, epoch: int | None = None) -> None:
        stage = self._stage
        connected = stage.connected if isinstance(stage, Joined) else stage
        if isinstance(connected, Connected) and epoch in (None, connected.epoch):
            connected.abandon(reason)

    def release(self) -> None:
        """Let go of weights and pages, which would else stay until garbage is collected."""
        if holder := holder_of(self._stage):
            holder.mailbox.stop()  # a poll would else be waited for
        self._stage = None

    @property
    def _holder(self) -> Loaded | Unsharded:  # of requests and mail
        holder = holder_of(self._stage)
        assert holder is not None, f"rank {self.dp_rank} has loaded nothing"
        return holder

    @property
    def _recorder(self) -> Recorder | None:  # of its steps, once it has loaded
        holder = holder_of(self._stage)
        return None if holder is None else holder.requests.recorder

    @property
    def _mailbox(self) -> Mailbox:
        return self._holder.mailbox

    def _forward(self, mailbox: Mailbox, request: RankRequest) -> None:
        mailbox.submit([request])
        self._wake()

    def _wake(self) -> None:
        if isinstance(self._stage, Joined):  # else it reads its mail once it has joined
            self._stage.wake()

    def _fair_threads(self) -> int:
        return max(1, usable_cpus() // self.config.dp_size)

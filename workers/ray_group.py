"""Ranks as Ray actors; the only place that starts actors."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, InvalidStateError, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, TypeVar

from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.errors import RankFailed, StartError
from dp_runtime.startup.devices import resolve_device
from workers.deadline import within
from workers.messages import NO_RANK, Message, named
from workers.ranks import TOGETHER_S
from workers.ray_cluster.connection import LOST, RayConnection, connect
from workers.ray_cluster.errors import cause_of, plain
from workers.ray_cluster.packages import packages_for_ranks
from workers.ray_cluster.rank_actor import RayWorker, actor_class, search_path
from workers.ray_cluster.rooms import Rooms
from workers.standby.worker import worker_for
from workers.worker_group import WorkerGroup

LOOK_S = 0.2
Answer = TypeVar("Answer")
# What the driver's environment says about GPUs and their network holds for the ranks too.
PASSED_ON = ("NCCL_", "TORCH_NCCL_", "TORCH_SYMM_MEM_", "NVSHMEM_", "FLASHINFER_", "CUDA_MODULE_")

_log = logging.getLogger(__name__)


class RayRank:
    def __init__(self, dp_rank: int, actor: Any, connection: RayConnection) -> None:
        self.dp_rank = dp_rank
        self._actor, self._connection = actor, connection
        self._lock = threading.Lock()
        self._unanswered: set[Future[Any]] = set()
        connection.on_loss(self._lose)

    def created(self) -> Future[Any]:
        """Ray's own future, which fails with what the actor's creation raised."""
        future: Future[Any] = self._actor.__ray_ready__.remote().future()
        return future

    def call(self, message: Message[Answer]) -> Future[Answer]:
        outer: Future[Answer] = Future()
        with self._lock:
            self._unanswered.add(outer)
        outer.add_done_callback(self._forget)
        if not self._connection.connected:
            self._fail(outer, RankFailed(LOST))
            return outer
        try:
            answer = getattr(self._actor, message.group).remote(message).future()
        except Exception as error:
            text = f"{named(self.dp_rank)} can't be called: {cause_of(error)}"
            self._fail(outer, RankFailed(text))
        else:
            answer.add_done_callback(lambda done: self._pass_on(done, outer))
        return outer

    def kill(self) -> None:
        import ray

        if self._connection.connected:  # NOTE: without a connection Ray would make one
            ray.kill(self._actor)

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._unanswered.discard(future)

    def _lose(self, why: str) -> None:
        with self._lock:
            unanswered = list(self._unanswered)
        for future in unanswered:
            self._fail(future, RankFailed(why))

    def _fail(self, future: Future[Any], error: BaseException) -> None:
        with suppress(InvalidStateError):  # it has its answer
            future.set_exception(error)

    def _pass_on(self, done: Future[Any], outer: Future[Any]) -> None:
        """Unwrap what Ray wraps: the worker's own exception, or the death of the actor."""
        from ray.exceptions import RayError, RayTaskError

        match done.exception():
            case None:
                with suppress(InvalidStateError):
                    outer.set_result(done.result())
            case RayTaskError(cause=BaseException() as cause):
                self._fail(outer, cause)
            case RayError() as error:
                _log.info("%s: %s", named(self.dp_rank), plain(error))
                text = f"the actor of {named(self.dp_rank)} died: {cause_of(error)}"
                self._fail(outer, RankFailed(text))
            case error:
                self._fail(outer, error)


def start_ray(config: EngineConfig, deadline: float) -> WorkerGroup:
    """Connect, reserve room for the ranks and create their actors, all before the deadline."""
    import ray

    with ExitStack() as undo:
        connection = connect(config, deadline)
        undo.callback(connection.release)
        found = within(deadline, "ask Ray for its resources", ray.cluster_resources)
        config = resolve_device(config, int(found.get("GPU", 0)), "the Ray cluster")
        config = with_absolute_paths(config)
        rooms = Rooms(config, connection, deadline)
        undo.callback(rooms.close)
        launcher = RayLauncher(config, rooms, connection, undo)
        ranks = within(deadline, "create actors", launcher.launch_all)
        _wait_created(ranks, connection, deadline)
        return WorkerGroup(config, replace(launcher, undo=undo.pop_all()), ranks)


def with_absolute_paths(config: EngineConfig) -> EngineConfig:
    """Give the full path of what the driver sees: ranks may have another working directory."""
    draft = config.speculative_draft_model
    return replace(
        config,
        model=_absolute(config.model),
        speculative_draft_model=None if draft is None else _absolute(draft),
    )


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path) if os.path.isdir(path) else path
    except (ValueError, OSError):  # the ranks will say what is wrong with it
        return path


def environment_of_ranks(driver: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in driver.items() if name.startswith(PASSED_ON)}


@dataclass(frozen=True, eq=False)
class RayLauncher:
    """Creates actors in their rooms; a lost rank's successor gets the same one."""

    config: EngineConfig
    rooms: Rooms
    connection: RayConnection
    undo: ExitStack

    def launch(self, dp_rank: int) -> RayRank:
        if not self.connection.connected:  # NOTE: without a connection Ray would make one
            raise RuntimeError(LOST)
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        # A standby holds nothing of a bundle, but lives on its host and there sees all GPUs.
        placement, index = self.rooms.of(max(dp_rank, 0))
        held = {} if dp_rank == NO_RANK else placement.bundle_specs[index]
        actor = actor_class().options(
            num_cpus=held.get("CPU", 0),
            num_gpus=held.get("GPU", 0),
            memory=held.get("memory"),
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement, index),
            runtime_env=self._environment or None,
        )
        device = "cuda:0" if self.config.device == "cuda" else "cpu"
        worker = pickle.dumps((worker_for, (dp_rank, self.config, device, RayWorker)))
        search = search_path(self.connection.starts_cluster)
        return RayRank(dp_rank, actor.remote(*search, worker), self.connection)

    def launch_all(self) -> list[RayRank]:
        return [self.launch(dp_rank) for dp_rank in range(self.config.dp_size)]

    def meeting(self, members: Membership) -> None: ...  # actors open one

    def make_room(self, dp_ranks: Sequence[int], timeout_s: float) -> None:
        self.rooms.make(dp_ranks, timeout_s)

    def give_room(self, dp_ranks: Sequence[int]) -> None:
        self.rooms.give_back(dp_ranks)

    def release(self) -> None:
        self.undo.close()

    @property
    def _environment(self) -> dict[str, Any]:
        environment = {} if self.connection.starts_cluster else packages_for_ranks()
        if self.config.device == "cuda" and (variables := environment_of_ranks(os.environ)):
            environment["env_vars"] = variables
        return environment


def _wait_created(ranks: Sequence[RayRank], connection: RayConnection, deadline: float) -> None:
    """StartError that names the cause, and for which ranks, if an actor can't be created."""
    futures = [rank.created() for rank in ranks]
    while not all(future.done() for future in futures) and monotonic() < deadline:
        done, _ = wait(futures, LOOK_S, FIRST_EXCEPTION)
        if not connection.connected:
            raise StartError(LOST)
        if any(future.exception() for future in done):
            wait(futures, TOGETHER_S)
            break
    causes: dict[str, list[int]] = {}
    for rank, future in enumerate(futures):
        if future.done() and (error := future.exception()):
            _log.info("actor of rank %d: %s", rank, plain(error))
            causes.setdefault(cause_of(error), []).append(rank)
    if causes:
        raise StartError("; ".join(f"actors of ranks {who}: {why}" for why, who in causes.items()))
    if late := [rank for rank, future in enumerate(futures) if not future.done()]:
        raise StartError(f"the actors of ranks {late} were not created in start_timeout_s")

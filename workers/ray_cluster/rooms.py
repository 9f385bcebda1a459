"""Rooms: the placement groups in which ranks run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from dp_runtime.config import EngineConfig
from dp_runtime.errors import StartError
from workers.deadline import within
from workers.placement import bundle_of, describe_room, strategy_of
from workers.ray_cluster.connection import RayConnection
from workers.ray_cluster.nodes import held_cpus, living_nodes

GONE_S = 2.0  # for Ray to take note that the room of the ranks is given back
LOOK_S = 0.2
WAITING_S = 5.0  # until the log says that there is no room yet
NEW_ROOM_S = 10.0  # for ranks that come later: others serve, and nobody wants to wait for long
NODE_ID = "ray.io/node-id"

_log = logging.getLogger(__name__)


class Rooms:
    """One placement group for the ranks of the start, and one for each that comes later.

    NOTE: Ray gives back a group as a whole, so what a rank of the start leaves is kept for it.
    """

    def __init__(self, config: EngineConfig, connection: RayConnection, deadline: float) -> None:
        self._config, self._connection = config, connection
        self._first = place(config, config.dp_size, deadline)
        self._later: dict[int, Any] = {}
        self._closed = False
        self._lock = threading.Lock()

    def of(self, dp_rank: int) -> tuple[Any, int]:  # placement group and bundle
        if dp_rank < self._config.dp_size:
            return self._first, dp_rank
        return self._later[dp_rank], 0

    def make(self, dp_ranks: Sequence[int], timeout_s: float) -> None:
        """Reserve room for ranks that have none; StartError if there is none in time."""
        new = [dp_rank for dp_rank in dp_ranks if dp_rank >= self._config.dp_size]
        deadline = monotonic() + min(timeout_s, NEW_ROOM_S)
        try:
            for dp_rank in new:
                placement = place(self._config, 1, deadline, self._host)
                with self._lock:
                    if not self._closed:
                        self._later[dp_rank] = placement
                        continue
                _remove(placement, self._connection)
                raise StartError("the engine is closed")
        except BaseException:
            self.give_back(new)
            raise

    def give_back(self, dp_ranks: Sequence[int]) -> None:
        with self._lock:
            placements = [self._later.pop(rank) for rank in dp_ranks if rank in self._later]
        for placement in placements:
            _remove(placement, self._connection)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.give_back(list(self._later))
        _remove(self._first, self._connection)

    @property
    def _host(self) -> str:
        """The node that all ranks must be on, if they share memory."""
        import ray

        if strategy_of(self._config, ()).get("strategy") != "STRICT_PACK":
            return ""
        table = ray.util.placement_group_table(self._first)
        return str(table["bundles_to_node_id"][0])


def place(config: EngineConfig, num_ranks: int, deadline: float, host: str = "") -> Any:
    """Reserve a bundle for each rank; StartError if there is no room for them in time.

    host: the id of the node that they must be on.
    """
    import ray

    nodes = within(deadline, "ask Ray for its nodes", lambda: living_nodes(deadline))
    strategy = strategy_of(config, nodes)
    bundle = bundle_of(config, nodes, strategy, held_cpus(), num_ranks)
    bundles = [bundle] * num_ranks
    if host:
        strategy = {
            "strategy": "STRICT_PACK",
            "bundle_label_selector": [{NODE_ID: host}] * num_ranks,
        }
    placement = within(
        deadline, "reserve room", lambda: ray.util.placement_group(bundles, **strategy)
    )
    need = f"room for {num_ranks} ranks of {bundle} ({strategy})"
    _log.info("placement: %s; %s", need, describe_room(nodes))
    try:
        _wait_for_room(placement, need, deadline)
    except BaseException:
        ray.util.remove_placement_group(placement)
        raise
    return placement


def _wait_for_room(placement: Any, need: str, deadline: float) -> None:
    warn_at = monotonic() + WAITING_S
    while not placement.wait(min(LOOK_S, max(deadline - monotonic(), 0.0))):
        now = monotonic()
        if now >= deadline:
            raise StartError(f"no {need} in time; {describe_room(living_nodes(now + GONE_S))}")
        if now >= warn_at:
            _log.warning("waiting for %s; %s", need, describe_room(living_nodes(deadline)))
            warn_at = deadline + 1


def _remove(placement: Any, connection: RayConnection) -> None:
    """Give the room back, which ends the actors in it."""
    import ray

    if connection.connected:
        with suppress(StartError):  # Ray does not answer; the room is given back with the job
            within(
                monotonic() + GONE_S,
                "give room back",
                lambda: ray.util.remove_placement_group(placement),
            )

"""Placement by Ray: ranks' shares of CPUs and GPUs, on one host or in one NVLink domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dp_runtime.config import EngineConfig
from dp_runtime.parallel.transports import TRANSPORTS

GPU_DOMAIN = "ray.io/gpu-domain"  # the label of the nodes whose GPUs one NVLink network joins
_SHARES = 10_000  # Ray counts resources in ten-thousandths
_SMALLEST = 0.01  # CPUs of a rank
_NO_CPUS = {"memory": 1.0}  # a byte: Ray has no empty bundles


@dataclass(frozen=True)
class Node:
    """A living node of the cluster: what it has, and what of it nobody holds."""

    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def room_for(self, cpus: float, gpus: float) -> int:
        """Count the free bundles of so many CPUs and GPUs; `cpus` is not 0."""
        by_cpus = int(self.free.get("CPU", 0.0) / cpus + 1e-6)
        return min(by_cpus, int(self.free.get("GPU", 0.0) / gpus + 1e-6)) if gpus else by_cpus


def bundle_of(
    config: EngineConfig,
    nodes: Sequence[Node],
    strategy: Mapping[str, Any],
    held: float,
    num_ranks: int | None = None,  # None: those of the start
) -> dict[str, float]:
    """Return a rank's shares of what is free: a fraction of a CPU if ranks are more than CPUs.

    Where none is free, they run on those the caller, such as an actor, holds (`held`), or wait.
    """
    gpus = _SHARES // config.ranks_per_gpu / _SHARES if config.device == "cuda" else 0.0
    one_host = strategy.get("strategy") == "STRICT_PACK"
    share = cpu_share(nodes, num_ranks or config.dp_size, gpus, one_host)
    bundle = {"CPU": share or _SMALLEST} if share or not held else dict(_NO_CPUS)
    return bundle | ({"GPU": gpus} if gpus else {})


def cpu_share(nodes: Sequence[Node], num_ranks: int, gpus: float, one_host: bool) -> float:
    """Return the most CPUs, up to one, that each rank can have of what is free; 0.0 if none."""
    cpus = [node.free.get("CPU", 0.0) for node in nodes]
    shares = {1.0} | {
        int(100 * free / ranks + 1e-6) / 100 for free in cpus for ranks in range(1, num_ranks + 1)
    }
    for share in sorted((share for share in shares if 0 < share <= 1), reverse=True):
        rooms = [node.room_for(share, gpus) for node in nodes]
        if (max(rooms) if one_host else sum(rooms)) >= num_ranks:
            return share
    return 0.0


def strategy_of(config: EngineConfig, nodes: Sequence[Node]) -> dict[str, Any]:
    """Return arguments of Ray's placement_group: one host for ranks that share memory, else few.

    GPU ranks are packed into one NVLink domain, if one has room for all of them when it is empty.
    """
    gpus = config.device == "cuda"
    transport = TRANSPORTS.get(config.collective)  # None for auto, which goes by the hosts
    one_host = transport is not None and not transport.spans_hosts
    if one_host or (gpus and config.ranks_per_gpu > 1):
        return {"strategy": "STRICT_PACK"}
    rooms: dict[str, int] = {}
    for node in nodes:
        domain = node.labels.get(GPU_DOMAIN)
        if domain is not None:
            rooms[domain] = rooms.get(domain, 0) + int(node.total.get("GPU", 0))
    if gpus and max(rooms.values(), default=0) >= config.dp_size:
        return {"topology_strategy": {GPU_DOMAIN: "STRICT_PACK"}}
    return {"strategy": "PACK"}


def describe_room(nodes: Sequence[Node]) -> str:
    """Say what the cluster has and what of it is free."""
    parts = []
    for kind in ("CPU", "GPU"):
        total = sum(node.total.get(kind, 0.0) for node in nodes)
        free = sum(node.free.get(kind, 0.0) for node in nodes)
        parts.append(f"{free:g} of {total:g} {kind}s")
    return f"free on its {len(nodes)} nodes are {' and '.join(parts)}"

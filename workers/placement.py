"""Where Ray puts the ranks: their shares of CPUs and GPUs, on one host or in one NVLink domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dp_runtime.config import EngineConfig
from dp_runtime.parallel.transports import TRANSPORTS

GPU_DOMAIN = "ray.io/gpu-domain"  # the label of the nodes whose GPUs one NVLink network joins
_SHARES = 10_000  # Ray counts resources in ten-thousandths


def bundle_of(config: EngineConfig, cpus: float) -> dict[str, float]:
    """CPU and GPU shares of a rank; a fraction of a CPU if there are more ranks than `cpus`."""
    share = min(1.0, int(100 * cpus / config.dp_size) / 100)
    bundle = {"CPU": max(share, 0.01)}
    if config.device != "cuda":
        return bundle
    return bundle | {"GPU": _SHARES // config.ranks_per_gpu / _SHARES}


def cpus_for(strategy: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> float:
    """CPUs that the ranks may share: those of the largest host if all are packed into one."""
    cpus = [float(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    return max(cpus) if strategy.get("strategy") == "STRICT_PACK" else sum(cpus)


def strategy_of(config: EngineConfig, nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return arguments of Ray's placement_group.

    Ranks that share memory are packed into one host; GPU ranks into one NVLink domain, if one has
    room for all of them when it is empty; others into few hosts.
    """
    gpus = config.device == "cuda"
    transport = TRANSPORTS.get(config.collective)  # None for auto, which goes by the hosts
    one_host = transport is not None and not transport.spans_hosts
    if one_host or (gpus and config.ranks_per_gpu > 1):
        return {"strategy": "STRICT_PACK"}
    rooms: dict[str, int] = {}
    for node in nodes:
        domain = node["Labels"].get(GPU_DOMAIN) if node["Alive"] else None
        if domain is not None:
            rooms[domain] = rooms.get(domain, 0) + int(node["Resources"].get("GPU", 0))
    if gpus and max(rooms.values(), default=0) >= config.dp_size:
        return {"topology_strategy": {GPU_DOMAIN: "STRICT_PACK"}}
    return {"strategy": "PACK"}

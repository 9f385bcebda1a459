"""Nodes of the cluster: what they have, and what of it is free."""

from __future__ import annotations

from time import monotonic

from workers.placement import Node
from workers.ray_cluster.connection import is_client


def living_nodes(deadline: float) -> list[Node]:
    import ray
    from ray._private.state import available_resources_per_node

    if is_client():  # only a process of the cluster can look
        look = ray.remote(num_cpus=0)(available_resources_per_node)
        free = ray.get(look.remote(), timeout=max(deadline - monotonic(), 0.01))
    else:
        free = available_resources_per_node()
    return [
        Node(node["Resources"], free.get(node["NodeID"], {}), node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def held_cpus() -> float:
    """Return the CPUs that Ray has given to this process, if it is an actor or a task."""
    import ray

    if is_client() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return 0.0
    return float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0))

"""Processes: the plain worker, and the groups that start it as actors, processes or threads."""

from __future__ import annotations

from time import monotonic

from dp_runtime.config import EngineConfig
from workers.group import WorkerGroup


def start(config: EngineConfig, show_progress: bool = False) -> WorkerGroup:
    deadline = monotonic() + config.start_timeout_s
    match config.launcher:
        case "ray":
            from workers.ray_group import start_ray

            group = start_ray(config, deadline)
        case "local" | "thread":
            from workers.local_group import start_local

            group = start_local(config)
        case _:
            raise AssertionError(f"launcher {config.launcher} was checked by the config")
    group.start(show_progress, max(deadline - monotonic(), 0.0))
    return group

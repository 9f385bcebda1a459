"""Processes: the plain worker, and the groups that start it as actors, processes or threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic

from dp_runtime.config import EngineConfig
from dp_runtime.core.request import RankRequest
from dp_runtime.errors import StartError
from workers.start_errors import explained
from workers.supervision.group_flight import check_dump_directory
from workers.worker_group import WorkerGroup


def start(
    config: EngineConfig,
    show_progress: bool = False,
    first: Mapping[int, Sequence[RankRequest]] | None = None,
) -> WorkerGroup:
    """Start all ranks and return them when they serve; ValueError or StartError if they can't."""
    check_dump_directory(config)
    deadline = monotonic() + config.start_timeout_s
    try:
        group = _launch(config, deadline)
        group.start(show_progress, max(deadline - monotonic(), 0.0), first or {})
    except (OSError, MemoryError) as error:
        raise StartError(f"{type(error).__name__}: {explained(error)}") from error
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise StartError(explained(error)) from error  # threading's, of a limit
    return group


def _launch(config: EngineConfig, deadline: float) -> WorkerGroup:
    match config.launcher:
        case "ray":
            from workers.ray_group import start_ray

            return start_ray(config, deadline)
        case "local" | "thread":
            from workers.local_group import start_local

            return start_local(config)
    raise AssertionError(f"launcher {config.launcher} was checked by the config")

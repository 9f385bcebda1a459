"""Ranks as Ray actors; the only place that starts actors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from logging import WARNING
from pathlib import Path
from typing import Any, TypeVar

from collectives.session import session_token
from dp_runtime.config import EngineConfig
from dp_runtime.errors import RankFailed, StartError
from dp_runtime.startup.devices import resolve_device
from workers.group import WorkerGroup
from workers.messages import ConcurrencyGroup, Message
from workers.placement import bundle_of, cpus_for, strategy_of
from workers.worker import Worker

PLACEMENT_S = 60.0
Answer = TypeVar("Answer")
# What the driver's environment says about GPUs and their network holds for the ranks too.
PASSED_ON = ("NCCL_", "TORCH_NCCL_", "TORCH_SYMM_MEM_", "NVSHMEM_", "FLASHINFER_", "CUDA_MODULE_")


class RayRank:
    def __init__(self, dp_rank: int, actor: Any) -> None:
        self.dp_rank = dp_rank
        self._actor = actor

    def call(self, message: Message[Answer]) -> Future[Answer]:
        outer: Future[Answer] = Future()
        answer = getattr(self._actor, message.group).remote(message)
        answer.future().add_done_callback(lambda done: self._pass_on(done, outer))
        return outer

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)

    def _pass_on(self, done: Future[Any], outer: Future[Any]) -> None:
        """Unwrap what Ray wraps: the worker's own exception, or the death of the actor."""
        from ray.exceptions import RayActorError, RayTaskError

        match done.exception():
            case None:
                outer.set_result(done.result())
            case RayTaskError() as error:
                outer.set_exception(error.cause)
            case RayActorError() as error:
                first = str(error).strip().splitlines()[0]
                text = f"the actor of rank {self.dp_rank} died: {first}"
                outer.set_exception(RankFailed(text))
            case error:
                outer.set_exception(error)


def start_ray(config: EngineConfig) -> WorkerGroup:
    import ray

    with ExitStack() as undo:
        if _connect(config):
            undo.callback(ray.shutdown)
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        config = resolve_device(config, num_gpus, "the Ray cluster")
        placement = place(config)
        undo.callback(ray.util.remove_placement_group, placement)
        handles = [_actor(config, rank, placement) for rank in range(config.dp_size)]
        return WorkerGroup(config, handles, undo.pop_all().close)


def place(config: EngineConfig) -> Any:
    """Reserve a bundle for each rank (StartError if there is no room in PLACEMENT_S)."""
    import ray

    resources, nodes = ray.cluster_resources(), ray.nodes()
    strategy = strategy_of(config, nodes)
    bundle = bundle_of(config, cpus_for(strategy, nodes))
    placement = ray.util.placement_group([bundle] * config.dp_size, **strategy)
    try:
        if not placement.wait(PLACEMENT_S):
            raise StartError(
                f"no room for {config.dp_size} ranks of {bundle} ({strategy}) in "
                f"{PLACEMENT_S:g} s; the cluster has {resources}"
            )
    except BaseException:
        ray.util.remove_placement_group(placement)
        raise
    return placement


def _connect(config: EngineConfig) -> bool:
    """Join the cluster that the config or the environment names, else start one.

    Returns whether this call has connected the process, which the engine then undoes at its end.

    NOTE: a cluster's ports listen on all interfaces, and who may talk to it runs code as its user.
    One started here asks for the user's token (~/.ray) unless RAY_AUTH_MODE says no.
    """
    import ray

    if ray.is_initialized():
        return False
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=WARNING,
                runtime_env={"py_modules": _packages()},
            )
        except (ConnectionError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise StartError(f"ray_address: no cluster answers at {address!r}: {reason}") from error
        return True
    ray.init("local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    return True


def _packages() -> list[str]:
    """Directories of this program, which workers of a running cluster may not have."""
    root = Path(__file__).parents[1]
    return [str(root / name) for name in ("dp_runtime", "collectives", "workers")]


def environment_of_ranks(driver: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in driver.items() if name.startswith(PASSED_ON)}


def _actor(config: EngineConfig, dp_rank: int, placement: Any) -> RayRank:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    gpu = config.device == "cuda"
    bundle = placement.bundle_specs[dp_rank]
    actor = (
        _actor_class()
        .options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement, dp_rank),
            runtime_env={"env_vars": environment_of_ranks(os.environ)} if gpu else None,
        )
        .remote(dp_rank, config, "cuda:0" if gpu else "cpu")
    )
    return RayRank(dp_rank, actor)


def _actor_class() -> Any:
    """Make the Worker an actor; Ray Client has no options of calls, so each group is a method."""
    import ray

    def method(group: ConcurrencyGroup) -> Any:
        def answer(self: Worker, message: Message[Any]) -> Any:
            return self.answer(message)

        return ray.method(concurrency_group=group.value)(answer)

    title = f"Rank_{session_token()}"  # how `ps` shows the actor's process
    methods = {group.value: method(group) for group in ConcurrencyGroup}
    return ray.remote(concurrency_groups=dict.fromkeys(methods, 1))(type(title, (Worker,), methods))

"""Ranks as Ray actors, on one cluster for all tests.

What does not depend on who starts the ranks is slow here: test_local.py asserts the same of ranks
that are processes, over the same WorkerGroup.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from dp_runtime import Engine
from dp_runtime.core.request import FinishReason
from dp_runtime.errors import EngineClosed, RankFailed
from dp_runtime.flight.record import Source
from dp_runtime.metrics.status import RankState
from tests.checkpoints import tiny_checkpoint
from tests.workers.engines import ENDLESS, SHORT, TOLD_S, Driver, engine
from tests.workers.leftovers import (
    left_overs,
    nothing_new,
    rank_processes,
    serving_processes,
    wait_until,
)
from workers.supervision.leaving import STOP_S

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = left_overs()
    yield
    wait_until(lambda: nothing_new(before), "no rank and no shared memory is left", 30)
    wait_until(all_resources_free, "all shares of CPUs are given back", 30)


def all_resources_free() -> bool:
    import ray

    return bool(ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


def test_the_same_tokens_as_threads_until_a_rank_is_lost(model: Path) -> None:
    prompts = [[1, 2, 3], [4] * 70, [5]]
    with engine(model, "thread") as threads:
        expected = [output.token_ids for output in threads.generate(prompts, SHORT)]
    with engine(model, "ray") as one:
        assert [output.token_ids for output in one.generate(prompts, SHORT)] == expected
        pids = {rank.pid for rank in one.health()}
        assert len(pids - {os.getpid()}) == 2
        assert {rank.source for rank in one.flight_record().ranks} == {Source.MEMORY}
        handle = one.submit([1, 2], ENDLESS, dp_rank=1)
        next(iter(handle))
        handle.abort()
        assert handle.result(30).finish_reason is FinishReason.ABORT
        lose_a_rank(one, signal.SIGKILL)
        closing = time.monotonic()
    assert time.monotonic() - closing < STOP_S


def lose_a_rank(one: Engine, number: signal.Signals) -> None:
    """Send rank 1 a signal that ends or stops it, and see all requests fail."""
    handles = [one.submit([1, 2, 3], ENDLESS, rank) for rank in range(2)]
    for handle in handles:
        next(iter(handle))
    lost = time.monotonic()
    os.kill(one.health()[1].pid, number)
    for handle in handles:
        with pytest.raises(RankFailed, match=r"rank 1 died|rank 0: .* for ranks 1"):
            handle.result(TOLD_S)
    assert time.monotonic() - lost < TOLD_S
    if number != signal.SIGSTOP:
        wait_until(lambda: one.health()[0].state is RankState.FAILED, "rank 0 has stopped")
        assert one.health()[1].state is RankState.UNREACHABLE


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGSTOP])
def test_a_lost_rank_fails_all_requests(model: Path, number: signal.Signals) -> None:
    with engine(model, "ray", step_timeout_s=1.0) as one:
        lose_a_rank(one, number)
        closing = time.monotonic()
    assert time.monotonic() - closing < STOP_S


@pytest.mark.slow
def test_use_after_close(model: Path) -> None:
    with engine(model, "ray") as one:
        unfinished = one.submit([1, 2], ENDLESS)
    with pytest.raises(EngineClosed):
        unfinished.result()
    with pytest.raises(EngineClosed):
        one.generate([[1]])
    one.close()


@pytest.mark.slow
def test_the_cluster_exports_the_metrics_of_ranks(model: Path) -> None:
    with engine(model, "ray") as one:
        one.generate([[1, 2, 3], [4] * 70, [5]], SHORT)
        report = one.report()
        expected = {
            "ray_dp_runtime_steps_total": float(report.steps * 2),
            "ray_vllm_generation_tokens_total": float(report.output_tokens),
            "ray_dp_runtime_first_token_seconds_count": 3.0,
        }
        wait_until(lambda: exported(set(expected)) == expected, "Ray tells what ranks did", 60)


def exported(names: set[str]) -> dict[str, float]:
    """What the node's page for Prometheus says of these, all ranks together."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    sums: dict[str, float] = {}
    with urlopen(url, timeout=10) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            for sample in family.samples:
                if sample.name in names:
                    sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


@pytest.mark.slow
def test_a_start_that_fails_on_one_rank(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path) / "model.safetensors"
    tensors, name = load_file(path), "model.layers.1.mlp.experts.7.up_proj.weight"  # rank 1's
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"^rank 1: .*tensor {name} is missing$"):
        engine(tmp_path, "ray")


def test_mistakes_that_only_the_cluster_knows(model: Path) -> None:
    with pytest.raises(ValueError, match=r"^device: 'cuda' is not allowed; the Ray cluster has no"):
        engine(model, "ray", device="cuda")
    looked = r"^model: '/nowhere' is not allowed; .* on host \S+, in /\S*, as user \S+$"
    with pytest.raises(ValueError, match=looked):
        engine(Path("/nowhere"), "ray", dp_size=1)  # all ranks say it, whichever is late


@pytest.mark.slow
def test_interrupt_leaves_nothing(model: Path, tmp_path: Path) -> None:
    import ray

    before, address = left_overs(), ray.get_runtime_context().gcs_address
    flags = ("--launcher", "ray", "--ray-address", address)
    with Driver(model, tmp_path, 2, *flags) as driver:
        wait_until(lambda: len(serving_processes() - before[0]) == 2, "two ranks serve", 200)
        driver.signal(signal.SIGINT)
        status, _, errors = driver.end()
    assert status == 130
    assert "Traceback" not in errors


@pytest.mark.slow
def test_ranks_end_with_their_drivers(model: Path, tmp_path: Path) -> None:
    """A stopped job is sent SIGTERM, then SIGKILL; actors end with their job."""
    import ray

    before, address = left_overs(), ray.get_runtime_context().gcs_address
    rooms = [tmp_path / name for name in ("terminated", "killed")]
    for room in rooms:
        room.mkdir()
    flags = ("--launcher", "ray", "--ray-address", address)
    with Driver(model, rooms[0], 2, *flags) as one, Driver(model, rooms[1], 2, *flags) as other:
        wait_until(lambda: len(serving_processes() - before[0]) == 4, "four ranks serve", 200)
        ranks = serving_processes() - before[0]
        for driver, number in ((one, signal.SIGTERM), (other, signal.SIGKILL)):
            driver.signal(number)
            assert driver.end()[0] != 0
    wait_until(lambda: not ranks & rank_processes().keys(), "the ranks end", 10)
    wait_until(lambda: left_overs()[2] <= before[2], "no name is left")


@pytest.mark.slow
def test_ranks_end_with_a_driver_that_started_the_cluster(model: Path, tmp_path: Path) -> None:
    before = left_overs()
    with Driver(model, tmp_path, 2, "--launcher", "ray") as driver:
        wait_until(lambda: len(serving_processes() - before[0]) == 2, "two ranks serve", 200)
        driver.signal(signal.SIGKILL)
        driver.end()
    wait_until(lambda: nothing_new(before), "nothing is left", 10)

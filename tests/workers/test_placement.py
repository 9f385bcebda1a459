"""Where Ray puts ranks: on one host, in one NVLink domain, and what of a GPU each gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from dp_runtime import EngineConfig
from tests.workers.engines import REPOSITORY
from workers.placement import GPU_DOMAIN, Node, bundle_of, cpu_share, describe_room, strategy_of
from workers.ray_group import environment_of_ranks

DOMAIN = {"topology_strategy": {GPU_DOMAIN: "STRICT_PACK"}}
FEW_HOSTS, ONE_HOST = {"strategy": "PACK"}, {"strategy": "STRICT_PACK"}


def node(domain: str | None, gpus: int, cpus: float = 8.0, **free: float) -> Node:
    labels = {} if domain is None else {GPU_DOMAIN: domain}
    total = {"CPU": cpus, "GPU": float(gpus)}
    return Node(total, total | free, labels)


@pytest.mark.parametrize(
    ("nodes", "fields", "expected"),
    [
        ([node("a", 2), node("a", 2)], {}, DOMAIN),
        ([node("a", 2), node("b", 2)], {}, FEW_HOSTS),
        ([node("a", 2)], {}, FEW_HOSTS),
        ([node(None, 8)], {}, FEW_HOSTS),
        ([node(None, 8), node("b", 4)], {}, DOMAIN),
        ([node("a", 8)], {"device": "cpu"}, FEW_HOSTS),
        ([node("a", 8)], {"device": "cpu", "ranks_per_gpu": 2}, FEW_HOSTS),
        ([node("a", 8)], {"ranks_per_gpu": 2}, ONE_HOST),
        ([node("a", 8)], {"collective": "shared_memory"}, ONE_HOST),
        ([node("a", 8)], {"collective": "shared_memory", "device": "cpu"}, ONE_HOST),
    ],
)
def test_strategy(nodes: list[Any], fields: dict[str, Any], expected: dict[str, Any]) -> None:
    config = EngineConfig("x", **dict[str, Any](dp_size=4, device="cuda") | fields)
    assert strategy_of(config, nodes) == expected


@pytest.mark.parametrize("ranks_per_gpu", [1, 2, 3, 6, 7])
def test_shares_of_a_gpu_fit_into_it(ranks_per_gpu: int) -> None:
    config = EngineConfig("x", dp_size=4, device="cuda", ranks_per_gpu=ranks_per_gpu)
    share = round(bundle_of(config, [node(None, 4)], {}, 0.0)["GPU"] * 10_000)  # Ray's unit
    assert share * ranks_per_gpu <= 10_000 < share * (ranks_per_gpu + 1)


def test_no_gpu_without_gpus() -> None:
    config = EngineConfig("x", dp_size=4, device="cpu")
    assert bundle_of(config, [node(None, 8, cpus=2.0)], FEW_HOSTS, 0.0) == {"CPU": 0.5}


@pytest.mark.parametrize(
    ("free", "num_ranks", "spread", "one_host"),
    [
        ((4.0, 6.0), 20, 0.5, 0.3),
        ((4.0, 6.0), 10, 1.0, 0.6),
        ((4.0, 6.0), 5, 1.0, 1.0),
        ((1.0, 1.0), 3, 0.5, 0.33),  # 2 CPUs for 3 ranks, but no host has room for two of 0.66
        ((0.0, 3.0), 4, 0.75, 0.75),
        ((0.5, 0.2), 2, 0.25, 0.25),
        ((0.01,), 2, 0.0, 0.0),
        ((0.0, 0.0), 2, 0.0, 0.0),
        ((1.0,), 3, 0.33, 0.33),
    ],
)
def test_ranks_share_the_cpus_that_are_free(
    free: tuple[float, ...], num_ranks: int, spread: float, one_host: float
) -> None:
    nodes = [node(None, 0, CPU=cpus) for cpus in free]
    assert cpu_share(nodes, num_ranks, 0.0, one_host=False) == spread
    assert cpu_share(nodes, num_ranks, 0.0, one_host=True) == one_host


def test_ranks_with_gpus_share_the_cpus_beside_these() -> None:
    nodes = [node(None, 4, CPU=2.0), node(None, 0, cpus=64.0)]
    assert cpu_share(nodes, 4, 1.0, one_host=False) == 0.5
    config = EngineConfig("x", dp_size=4, device="cuda")
    assert bundle_of(config, nodes, FEW_HOSTS, 0.0) == {"CPU": 0.5, "GPU": 1.0}


def test_a_caller_that_holds_all_cpus_shares_them_with_its_ranks() -> None:
    config = EngineConfig("x", dp_size=2, device="cpu")
    busy, rest = [node(None, 0, CPU=0.0)], [node(None, 0, CPU=1.0)]
    assert bundle_of(config, busy, FEW_HOSTS, 1.0) == {"memory": 1.0}
    assert bundle_of(config, rest, FEW_HOSTS, 1.0) == {"CPU": 0.5}
    assert bundle_of(config, busy, FEW_HOSTS, 0.0) == {"CPU": 0.01}  # it waits for others to end
    assert describe_room(busy) == "free on its 1 nodes are 0 of 8 CPUs and 0 of 0 GPUs"


def test_the_environment_is_passed_on_and_nothing_is_added() -> None:
    driver = {
        "NCCL_NVLS_ENABLE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "NVSHMEM_DISABLE_NVLS": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "FLASHINFER_JIT_DIR": "/a", "HOME": "/b",
        "CUDA_MODULE_LOADING": "LAZY", "CUDA_VISIBLE_DEVICES": "3", "MY_NCCL_X": "1",
    }  # fmt: skip
    kept = environment_of_ranks(driver)
    assert set(driver) - set(kept) == {"HOME", "CUDA_VISIBLE_DEVICES", "MY_NCCL_X"}
    assert all(driver[name] == value for name, value in kept.items())
    assert environment_of_ranks({"PATH": "/c"}) == {}


CLUSTER = f"""
import json, ray
from time import monotonic
from dp_runtime import EngineConfig
from workers.ray_cluster.rooms import place
ray.init("local", num_cpus=1, num_gpus=4, labels={{"{GPU_DOMAIN}": "rack1"}},
         include_dashboard=False, log_to_driver=False)
seen = {{}}
for fields in ({{"dp_size": 4}}, {{"dp_size": 8, "ranks_per_gpu": 2}}, {{"dp_size": 5}}):
    deadline = monotonic() + (0.3 if fields["dp_size"] == 5 else 20.0)
    try:
        placement = place(EngineConfig("x", device="cuda", **fields), fields["dp_size"], deadline)
    except Exception as error:
        seen[fields["dp_size"]] = str(error)
        continue
    nodes = ray.util.placement_group_table(placement)["bundles_to_node_id"].values()
    seen[fields["dp_size"]] = len(nodes)
    ray.util.remove_placement_group(placement)
print(json.dumps(seen))
"""


@pytest.mark.ray
def test_a_cluster_with_pretended_gpus() -> None:
    """The real scheduler, with the label; in a process of its own, since Ray is one per process."""
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=200, env=os.environ | {"RAY_AUTH_MODE": "token"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["4"], seen["8"]) == (4, 8)
    assert "no room for 5 ranks" in seen["5"]

"""The limits of a container, read from a tree of files that has the kernel's layout."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil
import pytest

from dp_runtime.host.limits import Cgroups, usable_cpus, usable_memory

GIB = 2**30
NO_LIMIT_V1 = 0x7FFFFFFFFFFFF000


def cgroups(root: Path, own: str, files: dict[str, str]) -> Cgroups:
    for name, content in files.items():
        file = root / "sys" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    (root / "own").write_text(own)
    return Cgroups(root / "sys", root / "own")


@pytest.mark.parametrize(
    ("own", "files", "memory", "cpus"),
    [
        ("0::/\n", {"memory.max": f"{2 * GIB}", "cpu.max": "150000 100000"}, 2 * GIB, 1.5),
        ("0::/\n", {"memory.max": "max", "cpu.max": "max 100000"}, math.inf, math.inf),
        ("0::/\n", {}, math.inf, math.inf),
        (  # of its own group, and of one above it
            "0::/pod/box\n",
            {"pod/box/memory.max": "max", "pod/memory.max": f"{GIB}",
             "pod/box/cpu.max": "400000 100000", "pod/cpu.max": "50000 100000"},
            GIB, 0.5,
        ),
        ("0::/\n", {"memory.max": f"{4 * GIB}", "memory.high": f"{3 * GIB}"}, 3 * GIB, math.inf),
        # A path of the host, which the container does not see: its own group is its root.
        ("0::/docker/12ab\n", {"memory.max": f"{GIB}", "cpu.max": "200000 100000"}, GIB, 2.0),
        (
            "9:memory:/box\n4:cpu,cpuacct:/box\n1:name=systemd:/init\n",
            {"memory/box/memory.limit_in_bytes": f"{GIB}",
             "cpu,cpuacct/box/cpu.cfs_quota_us": "250000",
             "cpu,cpuacct/box/cpu.cfs_period_us": "100000"},
            GIB, 2.5,
        ),
        (
            "9:memory:/\n4:cpu:/\n",
            {"memory/memory.limit_in_bytes": f"{NO_LIMIT_V1}",
             "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            float(NO_LIMIT_V1), math.inf,
        ),
        ("9:memory:/docker/12ab\n", {"memory/memory.limit_in_bytes": f"{GIB}"}, GIB, math.inf),
        (  # both versions beside each other
            "9:memory:/box\n0::/box\n",
            {"memory/box/memory.limit_in_bytes": f"{2 * GIB}", "unified/box/cpu.max": "1 1"},
            2 * GIB, 1.0,
        ),
        ("0::/\n", {"memory.max": "nonsense", "cpu.max": ""}, math.inf, math.inf),
    ],
)  # fmt: skip
def test_limits_of_a_container(
    tmp_path: Path, own: str, files: dict[str, str], memory: float, cpus: float
) -> None:
    found = cgroups(tmp_path, own, files)
    assert (found.memory_bytes(), found.cpus()) == (memory, cpus)


def test_the_smallest_limit_counts(tmp_path: Path) -> None:
    small = cgroups(tmp_path, "0::/\n", {"memory.max": f"{GIB // 4}", "cpu.max": "50000 100000"})
    assert usable_memory(small) == GIB // 4
    assert usable_cpus(small) == 1  # half a CPU still runs a thread
    nothing = Cgroups(tmp_path / "nowhere", tmp_path / "nowhere")
    assert usable_memory(nothing) == psutil.virtual_memory().total
    assert usable_cpus(nothing) == len(os.sched_getaffinity(0))


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wide = cgroups(tmp_path, "0::/\n", {"cpu.max": "400000 100000"})
    for allowed, expected in ((range(3), 3), (range(16), 4), (range(1), 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=allowed: set(cpus))
        assert usable_cpus(wide) == expected

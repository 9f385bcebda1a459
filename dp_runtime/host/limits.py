"""What of the host this process may use: affinity, and the limits of its container (cgroups)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Cgroups:
    """The control groups of a process, of version 1 or 2 (cgroups(7)), up to their roots.

    A limit of a group holds for all in it, so the smallest on the way up is the one that counts.
    """

    root: Path = CGROUPS
    own: Path = OWN_CGROUPS

    def memory_bytes(self) -> float:
        """Return the memory limit, math.inf without one."""
        limits = [math.inf]
        for directory in self._directories("memory"):
            for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
                limits += _numbers(directory / name)[:1]
        return min(limits)

    def cpus(self) -> float:
        """Return the CPU time that may be used at once, in CPUs; math.inf without a limit."""
        limits = [math.inf]
        for directory in self._directories("cpu"):
            quota = _numbers(directory / "cpu.max")
            if not quota:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota = [value for name in names for value in _numbers(directory / name)]
            if len(quota) == 2 and quota[0] > 0 and quota[1] > 0:  # a quota of -1 is none
                limits.append(quota[0] / quota[1])
        return min(limits)

    def _directories(self, controller: str) -> Iterator[Path]:
        """Yield the groups of a controller; in a container its own is often the root it sees."""
        try:
            lines = self.own.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                mount = self.root / "unified" if (self.root / "unified").is_dir() else self.root
            elif controller in controllers.split(","):
                mounts = [self.root / controllers, self.root / controller]
                mount = next((each for each in mounts if each.is_dir()), mounts[0])
            else:
                continue
            group = Path(path.lstrip("/"))
            yield from (mount / each for each in (group, *group.parents))


def usable_cpus(cgroups: Cgroups | None = None) -> int:
    """Count the CPUs that this process may keep busy; at least one."""
    cgroups = cgroups or Cgroups()
    on_linux = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    return max(1, math.floor(min(allowed, cgroups.cpus())))


def usable_memory(cgroups: Cgroups | None = None) -> int:
    """Count the bytes of memory that this process may fill, whatever is free."""
    cgroups = cgroups or Cgroups()
    return int(min(psutil.virtual_memory().total, cgroups.memory_bytes()))


def _numbers(file: Path) -> list[float]:
    """Return the numbers of a file, "max" being infinite; none if there is no such file."""
    try:
        words = file.read_text().split()
        return [math.inf if word == "max" else float(word) for word in words]
    except (OSError, ValueError):
        return []

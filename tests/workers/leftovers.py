"""What an engine could leave behind: processes, threads of ranks, names of shared memory."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from collectives.session import session_token
from collectives.shared_memory.group import shared_root


def rank_processes() -> dict[int, str]:
    """Processes that run a rank of this session, by pid: forked, fresh, and Ray actors."""
    token, found = session_token(), {}
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        words = process.info["cmdline"] or []
        fresh = "workers.local_rank" in words and "workers.forkserver" not in words  # not a server
        ours = process.info["name"].startswith("dp-rank-") or fresh
        if (ours and token in words) or (words and words[0].startswith(f"ray::Rank_{token}")):
            found[process.info["pid"]] = " ".join(words)
    return found


def serving_processes() -> set[int]:
    """Ranks that have joined the others: they map the memory that the ranks share."""
    return {pid for pid in rank_processes() if "dp-runtime-" in _maps(pid)}


LeftOvers = tuple[set[int], list[str], set[Path]]


def left_overs() -> LeftOvers:
    """Processes of ranks, threads of ranks in this process, and names of shared memory."""
    threads = sorted(t.name for t in threading.enumerate() if t.name.startswith("dp-rank"))
    return set(rank_processes()), threads, shared_memory_names()


def nothing_new(before: LeftOvers) -> bool:
    """Tell whether all that is there was there before, of which some may have ended meanwhile."""
    processes, threads, names = left_overs()
    more_threads = Counter(threads) - Counter(before[1])
    return processes <= before[0] and not more_threads and names <= before[2]


def shared_memory_names() -> set[Path]:
    return set(Path(shared_root()).glob(f"dp-runtime-{session_token()}-*"))


def wait_until(ok: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not ok():
        assert time.monotonic() < deadline, f"not after {timeout_s:g} s: {what}"
        time.sleep(0.02)


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""

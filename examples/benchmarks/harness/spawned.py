"""How a benchmark runs its ranks: spawned processes, of which rank 0 reports."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from typing import Any


def run_spawned(run_rank: Callable[..., None], dp_size: int, *place: Any) -> Any:
    """Call run_rank(rank, *place, results) in a process per rank; what rank 0 puts into results."""
    spawn = multiprocessing.get_context("spawn")
    results: Any = spawn.SimpleQueue()
    ranks = [
        spawn.Process(target=run_rank, args=(rank, *place, results)) for rank in range(dp_size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit("a rank failed")
    return results.get()

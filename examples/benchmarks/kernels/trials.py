"""Candidates of one kernel: each is compared with what is due, and timed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from typing import TypeVar

import torch
from torch import Tensor

from dp_runtime.kernels.dense_linear.tiles import DenseTile
from dp_runtime.kernels.fp8_linear.tiles import LinearTile

ALLOWED_ERROR = 1e-2  # bf16 rounds by up to 2^-9
SHARED_MEMORY = 227 << 10  # bytes that a program, or all on a multiprocessor, may have on SM90
Candidate = TypeVar("Candidate")
Tile = TypeVar("Tile", LinearTile, DenseTile)


def relative_error(found: Tensor, due: Tensor) -> float:
    return float((found.float() - due.float()).norm() / due.float().norm())


def try_all(
    candidates: Sequence[Candidate],
    error: Callable[[Candidate], float],
    us: Callable[[Candidate], float],
    deadline: float,
    allowed_error: float = ALLOWED_ERROR,
) -> dict[Candidate, float]:
    """Return microseconds, the fastest first; what is wrong or fails is named and left out.

    Candidates come in random order, a fair part of them if time runs out, and one at least.
    """
    found = dict[Candidate, float]()
    for done, at in enumerate(torch.randperm(len(candidates)).tolist()):
        if found and time.monotonic() > deadline:
            print(f"  out of time: {done} of {len(candidates)} tried", flush=True)
            break
        candidate = candidates[at]
        try:
            wrong_by = error(candidate)
            if wrong_by < allowed_error:
                found[candidate] = us(candidate)
            else:
                print(f"  WRONG by {wrong_by:.3g}: {candidate}", flush=True)
        except Exception as problem:  # a compiler's or a driver's, of any kind
            print(f"  failed: {candidate}: {type(problem).__name__}: {str(problem)[:160]}")
            torch.cuda.synchronize()  # a device that is lost says so here, and ends the run
    return dict(sorted(found.items(), key=lambda item: item[1]))


def summarize(rows: int, found: Mapping[str, Mapping[Tile, float]]) -> None:
    """Tiles, each with its best split, by their mean distance from the best of each matrix."""
    ratios: dict[Tile, dict[str, tuple[float, int]]] = defaultdict(dict)
    for name, times in found.items():
        best = min(times.values())
        for tile, us in sorted(times.items(), key=lambda item: -item[1]):
            ratios[replace(tile, split=1)][name] = (us / best, tile.split)
    means = {
        tile: exp(sum(log(ratio) for ratio, _ in each.values()) / len(each))
        for tile, each in ratios.items()
        if 2 * len(each) > len(found)
    }
    print(f"{rows} rows, over {len(found)} matrices:")
    for tile, mean in sorted(means.items(), key=lambda item: item[1])[:3]:
        splits = ", ".join(f"{name} {split}" for name, (_, split) in ratios[tile].items())
        print(f"  {mean:.3f} x the best (on {len(ratios[tile])})  {tile}\n      splits: {splits}")
    print(end="", flush=True)

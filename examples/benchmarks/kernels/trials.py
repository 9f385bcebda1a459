"""Candidates of one kernel: each is compared with what is due, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

ALLOWED_ERROR = 1e-2  # bf16 rounds by up to 2^-9
SHARED_MEMORY = 227 << 10  # bytes that a program, or all on a multiprocessor, may have on SM90
Candidate = TypeVar("Candidate")


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

"""Kernels compiled into Triton's cache by processes, for the compiler is for one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

Job = TypeVar("Job")


def compile_all(
    jobs: Iterable[Job], compile_one: Callable[[Job], None], num_workers: int, seconds: float
) -> set[Job]:
    """Return the jobs that compile within so many seconds; says which raise, and why."""
    context = get_context("forkserver")  # a forked process could not use the parent's CUDA
    context.set_forkserver_preload(["torch", "triton"])
    pool = ProcessPoolExecutor(num_workers, context)
    start, done = time.monotonic(), set[Job]()
    futures = {pool.submit(_try, compile_one, job): job for job in dict.fromkeys(jobs)}
    try:
        for future in as_completed(futures, timeout=seconds):
            problem = future.result()
            if problem:
                print(f"skipped {futures[future]}: {problem}", flush=True)
            else:
                done.add(futures[future])
    except (TimeoutError, BrokenExecutor) as error:
        print(f"{type(error).__name__}: what is not compiled yet is skipped", flush=True)
    pool.shutdown(cancel_futures=True)
    taken = time.monotonic() - start
    print(f"{len(done)} of {len(futures)} compiled in {taken:.0f} s", flush=True)
    return done


def _try(compile_one: Callable[[Job], None], job: Job) -> str:
    try:
        compile_one(job)
    except Exception as error:  # a compiler's or a driver's, of any kind: the candidate is out
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return ""

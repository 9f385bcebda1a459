"""Times of a layer's calls as a step finds them: what they read and their code is in no cache.

Before each call one kernel runs through more instructions than a multiprocessor keeps, one reads
as much as experts' weights between two layers' calls, which takes the L2 and the address
translations from it, and a small one writes the call's rows, as in a step that of the layer before
does. It lets the call start early, as ours do. All are in one CUDA graph, in which each call has
tensors of its own. Times are the profiler's: a call takes from the end of the small kernel until
nothing of the call runs any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import triton
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from dp_runtime.kernels.triton_launch import num_multiprocessors, overlaps
from examples.benchmarks.harness.device_timing import captured
from examples.benchmarks.kernels.cold_kernels import cold_code, cold_memory, cold_rows

CALLS = 32  # of a graph: layers, whose tensors no call finds where an earlier one left them
READ_BYTES = 600 << 20  # before each: a rank's experts of one layer of Qwen3-30B-A3B, of two ranks
BLOCK = 8192

Name = TypeVar("Name")
Call = Callable[[int], object]  # of a layer
Span = tuple[float, float, str]  # microseconds at which a kernel begins and ends, and its name


@dataclass(frozen=True, eq=False)
class Replay:
    run: Callable[[], None]
    reads: object  # kept for as long


@dataclass(frozen=True, eq=False)
class ColdTimer:
    memory: Tensor  # [CALLS, READ_BYTES / 4] float32, which is read between calls
    found: Tensor  # [programs] float32

    @classmethod
    def on(cls, device: torch.device) -> ColdTimer:
        programs = 4 * num_multiprocessors(device)
        memory = torch.zeros(CALLS, READ_BYTES // 4, device=device)
        return cls(memory, torch.zeros(programs, device=device))

    def times(
        self, makes: Iterable[tuple[Name, Callable[[], Call]]], rows: Tensor
    ) -> dict[Name, float]:
        """Return microseconds of each call that is made; what raises is named and left out."""
        replays = dict[Name, Replay]()
        for name, make in makes:
            try:
                replays[name] = self.capture(make(), rows)
            except Exception as error:  # a compiler's or a driver's, of any kind
                print(f"  {name} is out: {type(error).__name__}: {str(error)[:120]}", flush=True)
                torch.cuda.synchronize()  # a device that is lost says so here, and ends the run
        try:
            return dict(zip(replays, self.us(list(replays.values()))))
        except AssertionError as error:  # what the profiler lost
            print(f"  nothing is timed: {error}", flush=True)
            return {}

    def capture(self, call: Call, rows: Tensor) -> Replay:
        """Capture call(i) for each i below CALLS, all of which read rows."""
        source = rows.clone()
        return Replay(captured(partial(self._run, call, rows, source)), (call, rows, source))

    def _run(self, call: Call, rows: Tensor, source: Tensor) -> None:
        pdl = overlaps(rows.device)
        for i, memory in enumerate(self.memory):
            cold_code[(num_multiprocessors(rows.device),)](self.found, num_warps=4)
            cold_memory[self.found.shape](
                memory, self.found, len(memory) // BLOCK, BLOCK=BLOCK, num_warps=8
            )
            cold_rows[(triton.cdiv(rows.numel(), 1024),)](
                source, rows, rows.numel(), BLOCK=1024, PDL=pdl, launch_pdl=pdl
            )
            call(i)

    @staticmethod
    def us(replays: Sequence[Replay], rounds: int = 2) -> list[float]:
        """Return the median of each graph's calls, in microseconds."""
        due = rounds * len(replays) * CALLS
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for replay in (*replays[:1], *rounds * tuple(replays)):  # the first does not count
                replay.run()
            torch.cuda.synchronize()
        times = call_times(_spans(profiler.events()))
        assert due <= len(times) <= due + CALLS, f"the profile has {len(times)} calls of {due}"
        counted = np.array(times[len(times) - due :]).reshape(rounds, len(replays), CALLS)
        medians: list[float] = np.median(counted, (0, 2)).tolist()
        return medians


def _spans(events: Iterable[Any]) -> list[Span]:
    return sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == DeviceType.CUDA
    )


def call_times(spans: Iterable[Span]) -> list[float]:
    """Take each call from the end of the kernel that writes its rows to its own last end."""
    times, written = list[float](), None
    for _, end, name in spans:
        if name.startswith("cold_rows"):
            written = end
            times.append(0.0)
        elif name.startswith("cold_"):
            written = None
        elif written is not None:
            times[-1] = max(times[-1], end - written)
    return times

"""Profile: which kernels ran in some steps of a rank, and how long."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

SHORT_US = 10.0


@dataclass(frozen=True)
class Profile:
    """Kernels of some steps of one rank, in microseconds a step.

    A kernel that starts while the one before it still runs counts from that one's end on, so that
    all of them and the idle time add up to the span.
    """

    kernels: tuple[tuple[str, float, float], ...]  # name, calls, microseconds; longest first
    span_us: float
    idle_us: float  # nothing ran on the device
    short_us: float  # of that, in gaps shorter than SHORT_US: between kernels of one graph

    @classmethod
    def from_profiler(cls, profiler: Any, steps: int) -> Profile:
        spans = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA
        )
        calls, time = Counter[str](), defaultdict[str, float](float)
        idle, short, reached = 0.0, 0.0, spans[0][0]
        for start, end, name in spans:
            calls[name] += 1
            time[name] += max(0.0, end - max(start, reached))
            gap = max(0.0, start - reached)
            idle += gap
            short += gap if gap < SHORT_US else 0.0
            reached = max(reached, end)
        span = reached - spans[0][0]
        order = sorted(time, key=lambda name: -time[name])
        rows = tuple((name, calls[name] / steps, time[name] / steps) for name in order)
        return cls(rows, span / steps, idle / steps, short / steps)

    def __str__(self) -> str:
        lines = [f"{'us a step':>10} {'calls':>7} {'us each':>8}  kernel"]
        for name, calls, time in self.kernels:
            if time >= 0.5:
                lines.append(f"{time:>10.1f} {calls:>7.1f} {time / calls:>8.2f}  {name[:90]}")
        total = sum(time for _, _, time in self.kernels)
        lines.append(
            f"{total:>10.1f} in all; span {self.span_us:.1f}, idle {self.idle_us:.1f}, of it "
            f"{self.short_us:.1f} in gaps under {SHORT_US:.0f} us"
        )
        return "\n".join(lines)


class StepProfiler:
    """Profiles some of the steps that are counted."""

    def __init__(self, after: int, steps: int) -> None:
        self.profile: Profile | None = None
        self._after, self._steps = after, steps
        self._seen = 0
        self._profiler: Any = None

    def count(self) -> None:
        self._seen += 1
        if self._seen == self._after:
            torch.cuda.synchronize()
            activities = [torch.profiler.ProfilerActivity.CUDA]
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        elif self._seen == self._after + self._steps:
            torch.cuda.synchronize()
            self._profiler.stop()
            self.profile = Profile.from_profiler(self._profiler, self._steps)

"""Profile: which kernels ran in some steps of a rank, and how long."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

SHORT_US = 10.0
STAGE_BEGINS = ("gather_kernel", "AllGather")  # in the name of a MoE stage's first kernel


class Span(NamedTuple):
    """When a kernel ran, in microseconds."""

    start: float
    end: float
    name: str

    @property
    def begins_stage(self) -> bool:
        return any(part in self.name for part in STAGE_BEGINS)


@dataclass(frozen=True)
class Profile:
    """Kernels of some steps of one rank, in microseconds a step.

    A kernel that starts while the one before it still runs counts from that one's end on, so that
    all of them and the idle time add up to the span. All steps have as many MoE stages: a step
    here is those and what follows each, so it begins at the gather of its first layer.
    """

    kernels: tuple[tuple[str, float, float], ...]  # name, calls, microseconds; longest first
    span_us: float
    idle_us: float  # nothing ran on the device
    short_us: float  # of that, in gaps shorter than SHORT_US: between kernels of one graph
    by_step: tuple[
        Mapping[str, float], ...
    ] = ()  # kernel: microseconds, where stages are exchanged

    @classmethod
    def from_profiler(cls, profiler: Any, steps: int) -> Profile:
        spans = sorted(
            Span(event.time_range.start, event.time_range.end, event.name)
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA
        )
        return cls.from_spans(spans, steps)

    @classmethod
    def from_spans(cls, spans: Sequence[Span], steps: int) -> Profile:
        """spans: in the order of their starts."""
        calls, time = Counter[str](), defaultdict[str, float](float)
        stages = sum(span.begins_stage for span in spans)
        by_step = [defaultdict[str, float](float) for _ in range(steps if stages else 0)]
        idle, short, reached, stage = 0.0, 0.0, spans[0].start, -1
        for span in spans:
            busy = max(0.0, span.end - max(span.start, reached))
            calls[span.name] += 1
            time[span.name] += busy
            if stages:
                stage += span.begins_stage
                by_step[max(stage, 0) * steps // stages][span.name] += busy
            gap = max(0.0, span.start - reached)
            idle += gap
            short += gap if gap < SHORT_US else 0.0
            reached = max(reached, span.end)
        length = reached - spans[0].start
        order = sorted(time, key=lambda name: -time[name])
        rows = tuple((name, calls[name] / steps, time[name] / steps) for name in order)
        of_steps = tuple(dict(step) for step in by_step)
        return cls(rows, length / steps, idle / steps, short / steps, of_steps)

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

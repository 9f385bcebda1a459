"""PendingCapture: graphs that all ranks capture one at a time, while they serve or before."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from time import monotonic

import torch

from dp_runtime.errors import CaptureFailed, CollectiveAborted, CollectiveTimeout
from dp_runtime.metrics.status import GraphUse
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.runner.step_runner import CapturedGraphs

logger = logging.getLogger(__name__)


class PendingCapture:
    """Captures graphs in an order that all ranks share, one at each `advance`.

    First come those of passes without prefill, which can be replayed while the others are captured.
    Warming up enters collectives, so all ranks advance at the same places.
    """

    def __init__(
        self,
        graphs: CapturedGraphs,
        collective: RowCollective,
        make_room: Callable[[], None],  # in the collective, before any graph is captured
        used_bytes: Callable[[], int],  # of the device's memory, since before they were made
        on_captured: Callable[[int, int], None],  # hears how many are captured, of how many
    ) -> None:
        self.graphs = graphs
        self.use: GraphUse | None = None  # once all are captured
        self._collective, self._used_bytes, self._on_captured = collective, used_bytes, on_captured
        passes = [each for by_len in graphs.passes.values() for each in by_len.values()]
        in_pieces = graphs.piecewise.values()
        counts = [*(part.count for part in passes), *(part.count for part in in_pieces)]
        self._total = sum(counts)
        self._done = 0
        self._capture_s = 0.0
        of_passes = _after(make_room, chain.from_iterable(part.capture() for part in passes))
        beside = chain.from_iterable(part.capture_beside_prefill() for part in passes)
        of_pieces = chain.from_iterable(part.capture() for part in in_pieces)
        self._parts = deque(
            [
                (of_passes, CapturedGraphs(graphs.passes)),
                (chain(of_pieces, beside), graphs),
            ]
        )
        on_captured(0, self._total)

    def advance(self) -> CapturedGraphs | None:
        """Capture the next graph; without one, return all that can be replayed from now on."""
        started = monotonic()
        goes_on = self._capture_one(self._parts[0][0])
        self._capture_s += monotonic() - started
        if goes_on:
            return None
        _, captured = self._parts.popleft()
        if not self._parts:
            self.use = GraphUse(self._total, self._capture_s, self._used_bytes())
            logger.info("captured %s; %s", self.use, _sizes(self.graphs))
        return captured

    def _capture_one(self, captures: Iterator[None]) -> bool:
        try:
            with torch.inference_mode():
                for _ in captures:
                    self._done += 1
                    self._on_captured(self._done, self._total)
                    return True
        except (CollectiveAborted, CollectiveTimeout):
            raise
        except Exception as error:
            self._collective.raise_if_failed()  # an abort may end a capture with an error of CUDA
            text = f"graph {self._done + 1} of {self._total}: {type(error).__name__}: {error}"
            raise CaptureFailed(text) from error
        return False


def _after(make_room: Callable[[], None], captures: Iterator[None]) -> Iterator[None]:
    make_room()
    yield from captures


def _sizes(graphs: CapturedGraphs) -> str:
    rows = max((one.buckets.max_rows for one in graphs.piecewise.values()), default=0)
    return f"passes with prefill replay theirs up to {rows} rows of a rank"

"""PendingCapture: graphs that all ranks capture a few at a time, while they serve or before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from time import monotonic

import torch

from dp_runtime.errors import CaptureFailed, CollectiveAborted, CollectiveTimeout
from dp_runtime.metrics.status import GraphUse
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.runner.pass_graphs import PassGraphs
from dp_runtime.runner.piecewise_graphs import PiecewiseGraphs
from dp_runtime.runner.step_runner import CapturedGraphs

logger = logging.getLogger(__name__)


class PendingCapture:
    """Captures graphs in an order that all ranks share, a unit at each `advance`.

    A unit is the graph of a whole pass, or a model's MoE stages at one size: each takes about as
    long as one forward. Warming up enters collectives, so all ranks advance at the same places.
    """

    def __init__(
        self,
        graphs: CapturedGraphs,
        collective: RowCollective,
        used_bytes: Callable[[], int],  # of the device's memory, since before they were made
        on_captured: Callable[[int, int], None],  # hears how many are captured, of how many
    ) -> None:
        self.graphs = graphs
        self.use: GraphUse | None = None  # once all are captured
        self._collective, self._used_bytes, self._on_captured = collective, used_bytes, on_captured
        stages: Iterable[PassGraphs | PiecewiseGraphs] = graphs.piecewise.values()
        self._total = sum(part.count for part in (*stages, *_of_passes(graphs)))
        self._done = 0
        self._capture_s = 0.0
        self._captures = _captures(graphs)
        on_captured(0, self._total)

    def advance(self) -> bool:
        """Capture the next unit; True once there is none, so that the graphs can be replayed."""
        started = monotonic()
        goes_on = self._capture_unit()
        self._capture_s += monotonic() - started
        if not goes_on:
            self.use = GraphUse(self._total, self._capture_s, self._used_bytes())
            stages = max(
                (one.buckets.max_rows for one in self.graphs.piecewise.values()), default=0
            )
            logger.info(
                "captured %s; steps with prefill replay their MoE stages up to %d rows of a rank",
                self.use,
                stages,
            )
        return not goes_on

    def _capture_unit(self) -> bool:
        try:
            with torch.inference_mode():
                for ends_unit in self._captures:
                    self._done += 1
                    self._on_captured(self._done, self._total)
                    if ends_unit:
                        return True
        except (CollectiveAborted, CollectiveTimeout):
            raise
        except Exception as error:
            self._collective.raise_if_failed()  # an abort may end a capture with an error of CUDA
            text = f"graph {self._done + 1} of {self._total}: {type(error).__name__}: {error}"
            raise CaptureFailed(text) from error
        return False


def _captures(graphs: CapturedGraphs) -> Iterator[bool]:
    """Capture all graphs, and tell after each whether it is the last of its unit."""
    for model, stages in graphs.piecewise.items():
        for number, _ in enumerate(stages.capture(), 1):
            yield number % model.num_moe_layers == 0
    for of_pass in _of_passes(graphs):
        for _ in of_pass.capture():
            yield True


def _of_passes(graphs: CapturedGraphs) -> list[PassGraphs]:
    return [each for by_query_len in graphs.passes.values() for each in by_query_len.values()]

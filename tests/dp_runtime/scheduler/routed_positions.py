"""What a scheduler tells of the experts of tokens, where each position's expert is the position."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from dp_runtime.core.batch import Int64
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.scheduler.scheduler_output import SchedulerOutput


class RoutedPositions:
    def __init__(self) -> None:
        self.told_of: dict[int, list[int]] = defaultdict(list)

    def told(
        self, step: SchedulerOutput, positions: Int64, updates: Sequence[RequestUpdate]
    ) -> list[RequestUpdate]:
        """positions: the true ones of all rows of the target pass."""
        told = step.routed.told(positions[step.routed.rows][:, None, None], updates)
        for item in told:
            if item.routed_experts is not None:
                assert len(item.routed_experts), "an update that says nothing"
                self.told_of[item.request_id] += item.routed_experts[:, 0, 0].tolist()
        return told

    def check(self, request: RankRequest, outputs: Sequence[int]) -> None:
        """Every position was told once and in order, all but the last token's once it has one."""
        found = self.told_of[request.request_id]
        if not request.params.return_routed_experts:
            assert found == []
            return
        assert found == [*range(len(found))]
        if outputs:
            assert len(found) == len(request.prompt_token_ids) + len(outputs) - 1

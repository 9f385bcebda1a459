"""RoutedRows: rows of a step whose experts are returned: of every committed position once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from dp_runtime.core.batch import NO_IDS, NO_REPLAYS, Int16, Int64, RowValues
from dp_runtime.core.request import RequestUpdate, RoutedExperts
from dp_runtime.scheduler.request_state import RequestState
from dp_runtime.scheduler.request_table import RequestTable


@dataclass(frozen=True, eq=False)
class RoutedSpan:
    state: RequestState
    num_rows: int
    start: int | None  # position of the first; None of a decode, where the device may know better

    def told(self, experts: RoutedExperts, update: RequestUpdate | None) -> RequestUpdate | None:
        state, start = self.state, self.start
        if update is None:
            if start is None or state.finish_reason:
                return None  # it had ended before this step was committed
        elif update.error:
            return update
        elif start is None:
            start = state.num_prompt_tokens + update.first_index - 1
        end = min(start + self.num_rows, state.num_tokens - 1)  # the last token did not run yet
        assert start <= state.num_routed, f"no experts of {state.num_routed}..{start - 1}"
        if end <= state.num_routed:
            return update
        new = experts[state.num_routed - start : end - start].copy()
        state.num_routed = end
        told = update or RequestUpdate(state.request_id, len(state.outputs))
        return told._replace(routed_experts=new)


@dataclass(frozen=True, eq=False)
class RoutedRows:
    spans: tuple[RoutedSpan, ...]
    rows: Int64  # [rows] of all spans, in the target pass

    @classmethod
    def of(
        cls, table: RequestTable, req_indices: Int64, query_lens: Int64, starts: Sequence[int]
    ) -> RoutedRows:
        """Find those of a step's requests; starts: of the last ones, which are chunks."""
        places = places_of(table.returns_routing, req_indices)
        if not places:
            return NO_ROUTED_ROWS
        ends, num_decodes = query_lens.cumsum(), len(req_indices) - len(starts)
        spans = tuple(
            RoutedSpan(
                table.request(int(req_indices[place])),
                int(query_lens[place]),
                starts[place - num_decodes] if place >= num_decodes else None,
            )
            for place in places
        )
        rows = [np.arange(ends[place] - query_lens[place], ends[place]) for place in places]
        return cls(spans, np.concatenate(rows))

    def told(self, experts: RoutedExperts, updates: Sequence[RequestUpdate]) -> list[RequestUpdate]:
        """Tell the experts of these rows with the updates of the step, once it is committed."""
        by_request = {update.request_id: update for update in updates}
        first = 0
        for span in self.spans:
            own, first = experts[first : first + span.num_rows], first + span.num_rows
            request_id = span.state.request_id
            update = span.told(own, by_request.get(request_id))
            if update is not None:
                by_request[request_id] = update
        return list(by_request.values())


NO_ROUTED_ROWS = RoutedRows((), NO_IDS)


def brought_experts(
    table: RequestTable, req_indices: Int64, owner: Int64, positions: Int64
) -> RowValues:
    """Find rows whose experts came with their request, and these; owner: the request of a row."""
    places = places_of(table.replays_routing, req_indices)
    if not places:
        return NO_REPLAYS
    rows, experts = list[Int64](), list[Int16]()
    for place in places:
        replay = table.request(int(req_indices[place])).request.replay
        assert replay is not None, "the table says so"
        own = np.flatnonzero((owner == place) & (positions < len(replay)))
        rows.append(own)
        experts.append(replay[positions[own]])
    return RowValues(np.concatenate(rows), np.concatenate(experts))


def places_of(rows: Collection[int], req_indices: Int64) -> list[int]:
    """Find these rows of the table among a step's."""
    if not rows:
        return []
    return [place for place, index in enumerate(req_indices.tolist()) if index in rows]

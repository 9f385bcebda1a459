"""Relocation: requests that go on at another rank than the one they were given to."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby

from dp_runtime.core.membership import Transition
from dp_runtime.core.rank_events.listeners import Resume
from dp_runtime.core.rank_events.rank_load import RankLoad
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.engine.output_processor import OutputProcessor
from dp_runtime.engine.rank_group import RankGroup
from dp_runtime.engine.routing.admission import Admission
from dp_runtime.metrics.request_totals import RequestTotals

MAX_REPLAYS = 3  # without a token: the request may be what its ranks were lost of


class Relocation:
    """Moves requests that wait for their rank, and replays those whose rank serves no more.

    `sending` is held while requests are on their way, so nobody sees one on two ranks or on none.
    """

    def __init__(
        self,
        group: RankGroup,
        admission: Admission,
        outputs: OutputProcessor,
        sending: threading.RLock,
        totals_of: Callable[[int], RequestTotals],
    ) -> None:
        self._group, self._admission, self._outputs = group, admission, outputs
        self._sending, self._totals_of = sending, totals_of

    def report(self, dp_rank: int, load: RankLoad) -> None:
        moves = self._admission.report(dp_rank, load)
        for source, asked in groupby(moves, key=lambda move: move.source):
            self._group.recall(source, [move.request_id for move in asked])

    def settled(self, dp_rank: int, updates: Sequence[RequestUpdate]) -> list[RequestUpdate]:
        """Give requests that a rank has given back to others; return the other updates."""
        kept = []
        for update in updates:
            ended = update if update.given_back is None else self._recalled(dp_rank, update)
            if ended is not None:
                kept.append(ended)
        return kept

    def _recalled(self, dp_rank: int, update: RequestUpdate) -> RequestUpdate | None:
        """Give one that was given back to another rank; return its end if it is to end."""
        with self._sending:
            log = self._outputs.get(update.request_id)
            if log is None or log.dp_rank != dp_rank:
                return None
            target = self._admission.recalled(log.demand, bool(update.given_back))
            if target is None:
                return None
            if log.abort_asked:  # the rank that has heard of that does not know it any more
                return log.end_without_rank()
            if log.request.params.structured_outputs is not None:
                self._group.abort(dp_rank, [log.request_id])  # it keeps a grammar for it
            self._totals_of(dp_rank).moved += 1
            self._group.submit(target, [log.replay(self._totals_of(target))])
        return None

    def replay(
        self, transition: Transition, resume: Resume
    ) -> tuple[list[RequestUpdate], int, int]:
        """Have the next ranks go on with what others had; nobody submits meanwhile.

        Returns what has ended, how many go on, and how many losses were put down to a request.
        """
        again: defaultdict[int, list[RankRequest]] = defaultdict(list)
        ended, num_blamed = list[RequestUpdate](), 0
        with self._sending:
            self._admission.serve(transition.members, transition.gone)
            for log in self._outputs.of_ranks(transition.gone):
                log.num_losses += log.dp_rank in transition.lost
                is_why = log.num_losses > MAX_REPLAYS and not log.abort_asked
                if is_why or log.abort_asked:
                    num_blamed = max(num_blamed, is_why * log.num_losses)
                    ended.append(log.end_without_rank())
                    continue
                rank = self._admission.again(log.demand)
                again[rank].append(log.replay(self._totals_of(rank)))
            resume(again)
        return ended, sum(map(len, again.values())), num_blamed

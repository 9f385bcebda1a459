"""A policy of each kind. A setting names one: `engine.routing = "my_policy.py:FewestRequests"`.

The ranks run this file's text as the driver has read it. Those but the routing run on every rank,
which must all say the same: use nothing but the arguments, now and in earlier calls. Each epoch
makes new objects, without arguments.
"""

from collections.abc import Mapping

from dp_runtime.engine.routing.load_balancer import Demand, RankView
from dp_runtime.parallel.policies.own_policies import DraftTotals
from dp_runtime.parallel.prefill_budget import StepLoad


class Eights:
    """padding: every rank brings the largest rank's rows, rounded up to a multiple of eight."""

    def gathered_rows(self, real_rows: tuple[int, ...]) -> tuple[int, ...]:
        return (-(-max(real_rows) // 8) * 8,) * len(real_rows)


class FewestRequests:
    """routing: a request goes to the rank that has the fewest, whatever their lengths."""

    def choose(self, ranks: Mapping[int, RankView], demand: Demand) -> int:
        return min(ranks, key=lambda rank: (ranks[rank].requests, rank))


class ThirtyTwo:
    """prefill_budget: while requests wait for tokens, a rank takes 32 prompt tokens a step."""

    def prefill_budget(self, load: StepLoad) -> int | None:
        return 32 if load.num_sampling else None


class OneMoreOrLess:
    """speculative_draft_length: one more draft while most are accepted, else one less."""

    def draft_length(self, totals: DraftTotals) -> int:
        if not totals.proposed:
            return totals.num_drafts
        change = 1 if totals.accepted * 2 > totals.proposed else -1
        return min(max(totals.num_drafts + change, 1), totals.max_drafts)

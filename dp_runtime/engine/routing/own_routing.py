"""OwnRouting: a load balancer of the user's own, and a check of what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from dp_runtime.core.plain_values import plain_int
from dp_runtime.engine.routing.load_balancer import LOAD_BALANCERS, Demand, LoadBalancer, RankView
from dp_runtime.errors import require
from dp_runtime.parallel.policies.policy_errors import policy_errors
from dp_runtime.parallel.policies.policy_name import PolicyName


class Chooses(Protocol):
    def choose(self, ranks: Mapping[int, RankView], demand: Demand) -> int:
        """Return the dp_rank of a request; `reads_caches = True` of its class fills all views."""


class OwnRouting:
    def __init__(self, policy: Chooses) -> None:
        self._policy = policy
        self.reads_caches = bool(getattr(policy, "reads_caches", False))

    def choose(self, ranks: Mapping[int, RankView], demand: Demand) -> int:
        with policy_errors("routing", self._policy):
            said = self._policy.choose(ranks, demand)
            rank, allowed = plain_int(said), f"one of the ranks {', '.join(map(str, ranks))}"
            require(rank in ranks, "routing: choose", said, allowed)
        assert rank is not None, "it is among the ranks"
        return rank


def load_balancer(routing: str) -> LoadBalancer:
    if isinstance(routing, PolicyName):
        return OwnRouting(routing.make("routing"))
    return LOAD_BALANCERS[routing]()

"""StepPolicies: by what an epoch's ranks agree on padding, prefill and drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dp_runtime.config import EngineConfig
from dp_runtime.parallel.agreement import ProgramPolicy, keep_program
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.execution_plan import PlansPadding
from dp_runtime.parallel.padding import PaddingCost, PaddingMode, PaddingPolicy
from dp_runtime.parallel.padding_cost import measure_padding_cost
from dp_runtime.parallel.policies.own_policies import OwnBudget, OwnDraftLength, OwnPadding
from dp_runtime.parallel.policies.policy_name import PolicyName
from dp_runtime.parallel.prefill_budget import BudgetPolicy, budget_policy
from dp_runtime.speculative.adaptive_length import AdaptiveLength
from dp_runtime.startup.rank_plan import RankPlan


@dataclass(frozen=True, eq=False)
class StepPolicies:
    """Built-in ones, or the user's own; with a state of their own, and new in each epoch."""

    padding: PlansPadding
    program: ProgramPolicy
    budget: BudgetPolicy

    @classmethod
    def of(cls, config: EngineConfig, plan: RankPlan, collective: RowCollective) -> StepPolicies:
        """All ranks call it at the same time: padding `auto` measures collectives."""
        device = torch.device(plan.device)

        def measure() -> PaddingCost:
            return measure_padding_cost(collective, plan.model.hidden_size, plan.dtype, device)

        return cls.by(config, plan.depth, measure)

    @classmethod
    def by(
        cls, config: EngineConfig, depth: int, measure_cost: Callable[[], PaddingCost]
    ) -> StepPolicies:
        """Make those of a configuration; measure_cost is called for padding `auto` alone."""
        return cls(_padding(config, measure_cost), _program(config), _budget(config, depth))


def _padding(config: EngineConfig, measure_cost: Callable[[], PaddingCost]) -> PlansPadding:
    if isinstance(config.padding, PolicyName):
        return OwnPadding(config.padding.make("padding"), config.max_num_tokens)
    mode = PaddingMode(config.padding)
    return PaddingPolicy(mode, measure_cost() if mode is PaddingMode.AUTO else None)


def _program(config: EngineConfig) -> ProgramPolicy:
    own = config.speculative_draft_length
    if isinstance(own, PolicyName):
        return OwnDraftLength(own.make("speculative_draft_length"), len(config.programs))
    return AdaptiveLength(len(config.programs)) if config.speculative_adaptive else keep_program


def _budget(config: EngineConfig, depth: int) -> BudgetPolicy:
    own, max_rows = config.prefill_budget, config.max_num_tokens
    if isinstance(own, PolicyName):
        return OwnBudget(own.make("prefill_budget"), max_rows)
    return budget_policy(config.max_step_ms, max_rows, depth)

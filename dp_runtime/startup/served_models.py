"""ServedModels: the model of a rank, and the draft model that speculates for it, if any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.core.cache_spec import LayerState
from dp_runtime.layers.moe import RankSharding
from dp_runtime.layers.routing_buffer import RoutingBuffer
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.model import Model, PassModel
from dp_runtime.models.registry import build_model
from dp_runtime.speculative.draft import DraftConfig, DraftModel, build_draft
from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True, eq=False)
class ServedModels:
    target: Model
    draft: DraftModel | None

    @property
    def all(self) -> tuple[PassModel, ...]:
        return (self.target,) if self.draft is None else (self.target, self.draft)

    def target_keeping(self, routing: RoutingBuffer | None) -> Model:
        """Return the target; its routers leave their choices in the buffer, if there is one."""
        if routing is None:
            return self.target
        layers = map(routing.layer, count())
        return self.target.with_stages(lambda stage: stage.keeping(next(layers)))

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        draft: DraftConfig | None,
        weights: Sequence[WeightSource],
        backends: Sequence[AttentionBackend],
        states: Sequence[LayerState],  # of the model
        sharding: RankSharding,
        moe_backend: str,
    ) -> ServedModels:
        target = build_model(config, weights[0], sharding, backends[0], moe_backend, states)
        if draft is None:
            return cls(target, None)
        target = target.with_aux_hidden_states(draft.aux_hidden_state_layers)
        own = weights[1], sharding, backends[1], moe_backend
        return cls(target, build_draft(draft, target, *own))

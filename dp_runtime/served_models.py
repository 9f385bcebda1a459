"""ServedModels: the model of a rank, and the draft model that speculates for it, if any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dp_runtime.loader import WeightSource
from dp_runtime.models import Model, ModelConfig, RankSharding, SlotModel, build_model
from dp_runtime.protocols import AttentionBackend
from dp_runtime.speculative.draft import DraftConfig, DraftModel, build_draft

LayerAttention = Callable[[int], AttentionBackend]


@dataclass(frozen=True, eq=False)
class ServedModels:
    """One rank's part of all that it runs."""

    target: Model
    draft: DraftModel | None

    @property
    def all(self) -> tuple[SlotModel, ...]:
        return (self.target,) if self.draft is None else (self.target, self.draft)

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        weights: WeightSource,
        sharding: RankSharding,
        attention: LayerAttention,
        moe_backend: str,
    ) -> ServedModels:
        """A model without a draft."""
        return cls(build_model(config, weights, sharding, attention, moe_backend), None)

    def with_draft(
        self,
        config: DraftConfig,
        weights: WeightSource,
        sharding: RankSharding,
        attention: LayerAttention,
        moe_backend: str,
    ) -> ServedModels:
        """The same model, now with the features that the draft reads, and the draft."""
        target = self.target.with_features(config.feature_layers)
        draft = build_draft(config, target, weights, sharding, attention, moe_backend)
        return ServedModels(target, draft)

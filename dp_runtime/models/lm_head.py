"""LmHeadMixin: what follows from a model's configuration, MoE stages and LM head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Protocol

from torch import Tensor

from dp_runtime.layers.gated_delta_net import GatedDeltaNet
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe import MoeStage


class Sizes(Protocol):
    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


class LmHeadMixin(ABC):
    """The part of `PassModel` that targets and draft models have in common."""

    config: Sizes
    head: Linear

    @property
    @abstractmethod
    def moe_stages(self) -> tuple[MoeStage, ...]:
        pass

    @property
    def delta_nets(self) -> tuple[GatedDeltaNet, ...]:
        return ()

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @cached_property
    def num_moe_layers(self) -> int:
        return len(self.moe_stages)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return self.head(hidden) if out is None else self.head.into(hidden, out)

    def logits_bytes(self, num_rows: int) -> int:
        return self.head.activation_bytes(num_rows)

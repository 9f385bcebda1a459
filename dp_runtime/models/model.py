"""Models: what the runtime asks of one, and how one is built from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.layers.gated_delta_net import GatedDeltaNet
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe import MoeStage
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan
from dp_runtime.models.config import ModelConfig
from dp_runtime.parallel.row_exchange import RowExchange
from dp_runtime.vision.encoder import VisionEncoder


class PassModel(Protocol):
    """A model, or a draft model, as one rank holds it."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def backend(self) -> AttentionBackend: ...

    @property
    def num_moe_layers(self) -> int:
        """Count the layers that all-gather and reduce-scatter in every forward."""

    @property
    def moe_stages(self) -> tuple[MoeStage, ...]: ...

    @property
    def delta_nets(self) -> tuple[GatedDeltaNet, ...]:
        """List the layers that have a recurrent state."""

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> PassModel:
        """Copy the model with every MoE stage replaced, by one that keeps its routing, say."""

    def forward(self, inputs: PassInputs, plan: PassPlan, exchange: RowExchange) -> Hidden: ...

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Apply the LM head to [n, hidden] of `Hidden.last` -> [n, vocab], or `out`."""

    def forward_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        """Count the most bytes `forward` allocates; padded: not all gathered rows are real."""

    def logits_bytes(self, num_rows: int) -> int: ...


class Model(PassModel, Protocol):
    """A target model: everything but the experts of other ranks."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def aux_hidden_state_layers(self) -> tuple[int, ...]:
        """List layers whose inputs a draft model reads; none: it reads the final hidden state."""

    @property
    def embedding(self) -> Tensor:  # [vocab, hidden], which a draft model may share
        ...

    @property
    def head(self) -> Linear: ...

    @property
    def vision(self) -> VisionEncoder | None: ...  # None: it takes no images

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> Model: ...

    def with_aux_hidden_states(self, layers: tuple[int, ...]) -> Model:
        """Copy the model with other aux_hidden_state_layers."""

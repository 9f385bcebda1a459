"""Models: what the runtime asks of one, and how one is built from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.attention.plan import AttentionPlan
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe import MoeStage
from dp_runtime.models.causal_lm import Hidden, PassInputs
from dp_runtime.models.config import ModelConfig
from dp_runtime.parallel.exchange import RowExchange


class PassModel(Protocol):
    """What runs in a pass: a model, or a draft model, as one rank holds it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """Of its logits."""

    @property
    def backend(self) -> AttentionBackend:
        """Plans the attention of a pass for all layers."""

    @property
    def num_moe_layers(self) -> int:
        """MoE stages, each a gather and a reduce-scatter, that every forward runs."""

    @property
    def moe_stages(self) -> tuple[MoeStage, ...]:
        """Those stages, in the order in which a forward runs them."""

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> PassModel:
        """The same model, of which `make` has replaced every MoE stage."""

    def forward(self, inputs: PassInputs, plan: AttentionPlan, exchange: RowExchange) -> Hidden:
        """What this rank's rows, zero or more, become."""

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """The LM head of [n, hidden] as `forward` returns it in `last` -> [n, vocab], or `out`."""

    def forward_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        """Most bytes `forward` allocates at once; padded: some gathered rows are not real."""

    def logits_bytes(self, num_rows: int) -> int:
        """Bytes of the result of `logits`."""


class Model(PassModel, Protocol):
    """A target model: everything but the experts of other ranks."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def aux_hidden_state_layers(self) -> tuple[int, ...]:
        """Layers whose inputs are features; none: the hidden state behind the final norm is."""

    @property
    def embedding(self) -> Tensor:
        """[vocab, hidden], which a draft model may share."""

    @property
    def head(self) -> Linear:
        """The LM head, which a draft model may share."""

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> Model: ...

    def with_features(self, layers: tuple[int, ...]) -> Model:
        """The same model, whose features are the residual stream that enters these layers."""

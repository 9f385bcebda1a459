"""Models: what the runtime asks of one, and how one is built from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dp_runtime.layers.moe import MoeStage, RankSharding, RowExchange
from dp_runtime.layers.moe_kernels import make_moe_kernels
from dp_runtime.loader import WeightSource
from dp_runtime.metadata import AttentionMetadata
from dp_runtime.models.causal_lm import Hidden, SlotInputs
from dp_runtime.models.config import ModelConfig, RopeConfig, read_model_config
from dp_runtime.models.registry import ARCHITECTURES, architecture_module
from dp_runtime.protocols import AttentionBackend

__all__ = [
    "ARCHITECTURES",
    "Hidden",
    "Model",
    "ModelConfig",
    "RankSharding",
    "RopeConfig",
    "SlotInputs",
    "build_model",
    "read_model_config",
]


class Model(Protocol):
    """A model as one rank holds it: everything but the experts of other ranks."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""

    @property
    def num_moe_layers(self) -> int:
        """MoE stages, each a gather and a reduce-scatter, that every forward runs."""

    @property
    def moe_stages(self) -> tuple[MoeStage, ...]:
        """Those stages, in the order in which a forward runs them."""

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> Model:
        """The same model, of which `make` has replaced every MoE stage."""

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The layers whose inputs are the features of a forward; none: its `last` is."""

    def with_features(self, layers: tuple[int, ...]) -> Model:
        """The same model, whose features are the residual stream entering these layers."""

    def forward(
        self, inputs: SlotInputs, metadata: AttentionMetadata, exchange: RowExchange
    ) -> Hidden:
        """This rank's rows, zero or more -> what the LM head and a draft model take of each."""

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """The LM head of [n, hidden], of a forward's `last`, -> [n, vocab], perhaps into `out`."""

    def forward_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        """Most bytes `forward` allocates at once; padded: some gathered rows are not real."""

    def logits_bytes(self, num_rows: int) -> int:
        """Bytes of the result of `logits`."""


def build_model(
    config: ModelConfig,
    weights: WeightSource,
    sharding: RankSharding,
    attention: Callable[[int], AttentionBackend],
    moe_backend: str = "torch",
) -> Model:
    """Load one rank's part of a model; `attention(layer)` is the backend of that layer."""
    model: Model = architecture_module(config.architecture).build(
        config, weights, sharding, attention, make_moe_kernels(moe_backend)
    )
    return model

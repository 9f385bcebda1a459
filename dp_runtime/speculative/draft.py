"""Draft models: what the runtime asks of one, and how one is read and built.

The draft's row at position p takes the token at p + 1 and the target's feature of position p, and
predicts the token at p + 2; its keys and values lie at position p. In place of a target's feature a
chained draft takes the one that the forward before it returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from dp_runtime.attention.spec import AttentionBackend
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import make_moe_kernels
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.models.causal_lm import PassInputs
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.known_tensors import HINTS
from dp_runtime.models.model import Model, PassModel
from dp_runtime.weights.source import WeightSource

METHODS = {"mtp": "dp_runtime.speculative.mtp", "eagle3": "dp_runtime.speculative.eagle3"}


@dataclass(frozen=True)
class DraftConfig:
    """What the runtime plans a draft model with; a method adds what its layer needs.

    directory: of the weights. vocab_size: of the draft's logits. aux_hidden_state_layers: the
    target's layers whose inputs the draft reads; none: it reads the hidden state after the
    final norm.
    """

    method: str
    directory: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    hidden_size: int
    aux_hidden_state_layers: tuple[int, ...]


class DraftModel(PassModel, Protocol):
    """A draft model as one rank holds it: everything but the experts of other ranks.

    A forward takes the tokens that follow its rows' positions, and in `PassInputs.hidden` projected
    features of the target, or the features of the draft's own forward before, as they are.
    """

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> DraftModel: ...

    def project(self, features: Tensor) -> Tensor:
        """A target's features [n, features] -> [n, hidden], what a forward takes."""

    def token_ids(self, best: Tensor) -> Tensor:
        """Indices into the logits [n] int64 -> tokens of the target's vocabulary [n] int64."""


def beside(
    inputs: PassInputs, embedding: Tensor, embedding_norm: RMSNorm, hidden_norm: RMSNorm
) -> Tensor:
    """What a draft reads of each row, [rows, 2 * hidden]: normed embedding and hidden state."""
    embeds = embedding_norm.add(inputs.embedded(embedding), None)[0]
    return torch.cat((embeds, hidden_norm.add(inputs.hidden, None)[0]), -1)


def read_draft_config(
    model_directory: str, target: ModelConfig, draft_directory: str | None
) -> DraftConfig:
    """The draft model in a directory, an EAGLE-3 head, or with None the target's own MTP layer.

    Raises ValueError, in one line, for whatever is missing, malformed or does not fit the target.
    """
    if draft_directory is None:
        module: Any = import_module(METHODS["mtp"])
        config: DraftConfig = module.read_config(model_directory, target)
    else:
        module = import_module(METHODS["eagle3"])
        config = module.read_config(draft_directory, target)
    return config


def build_draft(
    config: DraftConfig,
    target: Model,
    weights: WeightSource,
    sharding: RankSharding,
    attention: Callable[[int], AttentionBackend],
    moe_backend: str = "torch",
) -> DraftModel:
    """Load one rank's part of a draft model, which shares the target's tensors where it can.

    attention(layer) is the backend of that layer of the draft's. Raises ValueError for weights that
    are missing or do not fit.
    """
    module: Any = import_module(METHODS[config.method])
    moe = make_moe_kernels(moe_backend)
    model: DraftModel = module.build(config, target, weights, sharding, attention, moe)
    weights.require_all_read(module.SKIPPABLE, HINTS)
    return model

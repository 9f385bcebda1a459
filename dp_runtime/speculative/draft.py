"""Draft models: what the runtime asks of one, and how one is read and built.

A row at position p reads token p + 1 and the target's hidden state of p, and predicts token p + 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.core.cache_spec import PagedKv
from dp_runtime.errors import require
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels, make_moe_kernels
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.models.causal_lm import PassInputs
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.known_tensors import HINTS
from dp_runtime.models.model import Model, PassModel
from dp_runtime.weights.source import WeightSource

METHODS = {"mtp": "dp_runtime.speculative.mtp", "eagle3": "dp_runtime.speculative.eagle3"}


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    method: str  # of METHODS
    directory: str  # of the weights
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # of the draft's logits
    hidden_size: int
    aux_hidden_state_layers: tuple[int, ...]  # whose inputs it reads; none: the final norm's output

    def cache_specs(
        self, page_size: int, kv_dtype: torch.dtype, dtype: torch.dtype
    ) -> tuple[PagedKv, ...]:
        """List what each layer keeps between passes, [layer]."""
        kv = PagedKv(self.num_kv_heads, self.head_dim, page_size, kv_dtype)
        return (kv,) * self.num_layers


class DraftModel(PassModel, Protocol):
    """Reads as `hidden` what `project` makes of the target's, or what its last forward returned."""

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> DraftModel: ...

    def project(self, aux_hidden_states: Tensor) -> Tensor:
        """Map a target's hidden states [n, layers * hidden] to what a forward reads [n, hidden]."""

    def token_ids(self, best: Tensor) -> Tensor:
        """Map indices into the logits [n] int64 to the target's vocabulary [n] int64."""


class DraftMethod(Protocol):
    """A kind of draft model; its module has one, named METHOD."""

    @property
    def skippable_tensors(self) -> tuple[str, ...]:
        """Patterns of tensors that a checkpoint may hold and nobody needs."""

    def read_config(self, directory: str, target: ModelConfig) -> DraftConfig: ...

    def build(
        self,
        config: DraftConfig,
        target: Model,
        weights: WeightSource,
        sharding: RankSharding,
        backend: AttentionBackend,
        moe: MoeKernels,
    ) -> DraftModel:
        """Load one rank's part of the model that `read_config` described."""


def find_method(name: str) -> DraftMethod:
    method: DraftMethod = import_module(METHODS[name]).METHOD
    return method


def concat_normed(
    inputs: PassInputs, embedding: Tensor, embedding_norm: RMSNorm, hidden_norm: RMSNorm
) -> Tensor:
    """Norm each row's embedding and hidden state and concatenate them: [rows, 2 * hidden]."""
    embeds = embedding_norm.add(inputs.embedded(embedding), None)[0]
    return torch.cat((embeds, hidden_norm.add(inputs.hidden, None)[0]), -1)


def read_draft_config(
    model_directory: str,
    target: ModelConfig,
    draft_directory: str | None,
    mtp_vocab: int | None = None,
) -> DraftConfig:
    """Read the EAGLE-3 head in draft_directory, or with None the target's own MTP layer.

    mtp_vocab: so many of the target's first tokens are all that the MTP layer proposes.
    """
    if draft_directory is None:
        config = find_method("mtp").read_config(model_directory, target)
        size = config.vocab_size
        ok, allowed = mtp_vocab is None or mtp_vocab <= size, f"at most the model's {size}"
        require(ok, "speculative_draft_vocab", mtp_vocab, allowed)
        return replace(config, vocab_size=mtp_vocab or size)
    allowed = "None with speculative_draft_model, which has a vocabulary of its own"
    require(mtp_vocab is None, "speculative_draft_vocab", mtp_vocab, allowed)
    return find_method("eagle3").read_config(draft_directory, target)


def build_draft(
    config: DraftConfig,
    target: Model,
    weights: WeightSource,
    sharding: RankSharding,
    backend: AttentionBackend,
    moe_backend: str = "torch",
) -> DraftModel:
    method, moe = find_method(config.method), make_moe_kernels(moe_backend)
    model = method.build(config, target, weights, sharding, backend, moe)
    weights.require_all_read(method.skippable_tensors, HINTS)
    return model

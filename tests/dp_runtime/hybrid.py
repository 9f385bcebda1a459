"""A tiny hybrid model: every other layer has a recurrent state instead of pages, and no kernel.

Its state depends on all tokens and on their order, and a slot that holds another's shows at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.core.cache_spec import CacheSpec, LayerState, PagedKv, RecurrentState
from dp_runtime.core.qk_norm_rope import CosSin
from dp_runtime.core.recurrent_metadata import RecurrentMetadata
from dp_runtime.layers.attention import Attention
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.rotary import Rotary
from dp_runtime.models import registry
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.lm_head import LmHeadMixin
from dp_runtime.models.qwen3_moe import ARCHITECTURE as QWEN3_MOE
from dp_runtime.parallel.row_exchange import RowExchange
from dp_runtime.weights.source import WeightSource
from tests.checkpoints import tiny_checkpoint

NAME = "TinyHybridForCausalLM"
DECAY = 0.8


def is_recurrent(layer: int) -> bool:
    return layer % 2 == 0


def hybrid_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> Path:
    """Save a model of 4 layers, and have the registry know its architecture."""
    monkeypatch.setitem(registry.ARCHITECTURES, NAME, __name__)
    tiny_checkpoint(path, **{"num_hidden_layers": 4, **overrides})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": [NAME]}))
    tensors = load_file(path / "model.safetensors")
    unread = [
        name for name in tensors if ".self_attn." in name and is_recurrent(int(name.split(".")[2]))
    ]
    kept = {name: tensor for name, tensor in tensors.items() if name not in unread}
    save_file(kept, path / "model.safetensors")
    return path


class HybridConfig(ModelConfig):
    def cache_specs(
        self, page_size: int, kv_dtype: torch.dtype, dtype: torch.dtype, max_drafts: int = 0
    ) -> tuple[CacheSpec, ...]:
        kv = PagedKv(self.num_kv_heads, self.head_dim, page_size, kv_dtype)
        size = (self.hidden_size,)
        state = RecurrentState((size, (1, *size)), (torch.float32, torch.float64))
        return tuple(state if is_recurrent(i) else kv for i in range(self.num_layers))


@dataclass(frozen=True, eq=False)
class Recurrence:
    """h = tanh(x + last x / 2), S = DECAY * S + h; the result is S."""

    state: LayerState  # S [slots, hidden], last x [slots, 1, hidden]

    def __call__(self, x: Tensor, sequences: RecurrentMetadata) -> Tensor:
        sums, lasts = self.state
        bounds, out = sequences.cu_seqlens.tolist(), torch.empty_like(x)
        fresh, tracks = sequences.is_fresh.tolist(), sequences.tracks
        for index, slot in enumerate(sequences.slots.tolist()):
            start, end = bounds[index], bounds[index + 1]
            total, last = sums[slot].clone(), lasts[slot, 0].clone()
            if fresh[index]:
                total, last = torch.zeros_like(total), torch.zeros_like(last)
            for row in range(start, end):
                if tracks is not None and row - start == tracks.rows_host[index] > 0:
                    track = tracks.slots[index]
                    sums[track], lasts[track, 0] = total, last
                total = DECAY * total + torch.tanh(x[row] + last.to(x.dtype) / 2).float()
                last, out[row] = x[row].to(last.dtype), total
            sums[slot], lasts[slot, 0] = total, last
        return out


@dataclass(frozen=True, eq=False)
class Layer:
    input_norm: RMSNorm
    mixer: Attention | Recurrence
    post_norm: RMSNorm
    mlp: MoeStage

    def __call__(self, x: Tensor, cos_sin: CosSin, plan: PassPlan, exchange: RowExchange) -> Tensor:
        normed = self.input_norm.add(x.clone(), None)[0]
        if isinstance(self.mixer, Recurrence):
            assert isinstance(plan.recurrent, RecurrentMetadata), "a pass without its sequences"
            x = x + self.mixer(normed, plan.recurrent)
        else:
            x = x + self.mixer(normed, cos_sin, plan.attention)
        return x + self.mlp(self.post_norm.add(x.clone(), None)[0], exchange)


@dataclass(frozen=True, eq=False)
class Hybrid(LmHeadMixin):
    config: HybridConfig
    embedding: Tensor
    rotary: Rotary
    layers: tuple[Layer, ...]
    norm: RMSNorm
    head: Linear
    backend: AttentionBackend
    aux_hidden_state_layers: tuple[int, ...] = ()
    vision: None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def moe_stages(self) -> tuple[MoeStage, ...]:
        return tuple(layer.mlp for layer in self.layers)

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> Hybrid:
        layers = tuple(replace(layer, mlp=make(layer.mlp)) for layer in self.layers)
        return replace(self, layers=layers)

    def with_aux_hidden_states(self, layers: tuple[int, ...]) -> Hybrid:
        assert not layers, "no draft model reads them"
        return self

    def forward(self, inputs: PassInputs, plan: PassPlan, exchange: RowExchange) -> Hidden:
        x = inputs.embedded(self.embedding)
        cos_sin = self.rotary(inputs.positions, x.dtype)
        for layer in self.layers:
            x = layer(x, cos_sin, plan, exchange)
        last = self.norm.add(x, None)[0]
        return Hidden(last, last)

    def forward_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        rows = 4 * own_rows * self.hidden_size * self.dtype.itemsize
        return rows + self.moe_stages[0].activation_bytes(own_rows, gathered_rows, padded)


@dataclass(frozen=True)
class HybridArchitecture:
    model_type: str = "qwen3_moe"

    def parse_config(self, read: ConfigFields, eos_token_ids: tuple[int, ...]) -> HybridConfig:
        config = QWEN3_MOE.parse_config(read, eos_token_ids)
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        return HybridConfig(**values | {"architecture": NAME})

    def build(
        self,
        config: HybridConfig,
        weights: WeightSource,
        sharding: RankSharding,
        backend: AttentionBackend,
        moe: MoeKernels,
        states: Sequence[LayerState],
    ) -> Hybrid:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        embedding = weights.load("model.embed_tokens.weight", (config.vocab_size, hidden))
        layers = []
        for index in range(config.num_layers):
            prefix = f"model.layers.{index}"
            mixer: Attention | Recurrence
            if is_recurrent(index):
                mixer = Recurrence(states[index])
            else:
                own = weights, f"{prefix}.self_attn", backend.layer(index)
                mixer = Attention.load(config.attention, *own)
            norms = (
                RMSNorm.load(weights, f"{prefix}.{name}_layernorm", hidden, eps)
                for name in ("input", "post_attention")
            )
            mlp = QWEN3_MOE.load_mlp(config, index, prefix, weights, sharding, moe)
            assert isinstance(mlp, MoeStage), "all layers have experts"
            layers.append(Layer(next(norms), mixer, next(norms), mlp))
        return Hybrid(
            config,
            embedding,
            Rotary.from_config(config.rope, config.head_dim, weights.device),
            tuple(layers),
            RMSNorm.load(weights, "model.norm", hidden, eps),
            Linear(weights.load("lm_head.weight", (config.vocab_size, hidden)), None),
            backend,
        )


ARCHITECTURE = HybridArchitecture()

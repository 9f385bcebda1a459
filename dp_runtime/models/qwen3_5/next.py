"""Qwen3NextForCausalLM: the same layers; a delta net's inputs are stored by groups of heads."""

from __future__ import annotations

import torch

from dp_runtime.layers.gated_delta_net import GatedDeltaNetShape
from dp_runtime.layers.linear import Linear
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.qwen3_5.config import MlpFields
from dp_runtime.models.qwen3_5.decoder import HybridDecoder, top_level
from dp_runtime.models.qwen3_moe import parse_moe_layers
from dp_runtime.weights.source import WeightSource


def read_mlp(fields: ConfigFields, num_layers: int) -> MlpFields:
    return MlpFields(
        norm_topk_prob=fields.boolean("norm_topk_prob", True),
        moe_layers=parse_moe_layers(fields, num_layers),
        intermediate_size=fields.integer("intermediate_size", 5632),
    )


def load_grouped_inputs(shape: GatedDeltaNetShape, weights: WeightSource, prefix: str) -> Linear:
    """Bring [q, k, v, z] and [b, a] of each k head into the order of `GatedDeltaNet.inputs`."""
    groups, hidden = shape.num_k_heads, shape.hidden_size
    qkvz_size, ba_size = shape.channels + shape.v_size, 2 * shape.num_v_heads
    qkvz = weights.load(f"{prefix}.in_proj_qkvz.weight", (qkvz_size, hidden))
    ba = weights.load(f"{prefix}.in_proj_ba.weight", (ba_size, hidden))
    dim, values = shape.head_k_dim, shape.v_size // groups
    ends = [dim, 2 * dim, 2 * dim + values]
    parts = qkvz.view(groups, -1, hidden).tensor_split(ends, 1)
    parts = (*parts, *ba.view(groups, -1, hidden).chunk(2, 1))
    return Linear(torch.cat([part.reshape(-1, hidden) for part in parts]), None)


ARCHITECTURE = HybridDecoder(
    name="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    find_text=top_level,
    read_mlp=read_mlp,
    load_inputs=load_grouped_inputs,
)

"""Qwen3NextForCausalLM: the same layers; a delta net's inputs are stored by groups of heads."""

from __future__ import annotations

import torch

from dp_runtime.layers.gated_delta_net import GatedDeltaNetShape
from dp_runtime.layers.linear import Projection, load_projection
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


def load_grouped_inputs(
    shape: GatedDeltaNetShape, weights: WeightSource, prefix: str
) -> Projection:
    """Bring [q, k, v, z] and [b, a] of each k head into the order of `GatedDeltaNet.inputs`."""
    groups, dim = shape.num_k_heads, shape.head_k_dim
    sizes = {"qkvz": shape.channels + shape.v_size, "ba": 2 * shape.num_v_heads}
    qkvz, ba = torch.arange(sum(sizes.values())).tensor_split([sizes["qkvz"]])
    ends = [dim, 2 * dim, 2 * dim + shape.v_size // groups]
    stored = (*qkvz.view(groups, -1).tensor_split(ends, 1), *ba.view(groups, -1).chunk(2, 1))
    order = torch.cat([part.flatten() for part in stored])
    parts = {f"{prefix}.in_proj_{name}": size for name, size in sizes.items()}
    return load_projection(weights, parts, shape.hidden_size, order=order)


ARCHITECTURE = HybridDecoder(
    name="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    find_text=top_level,
    read_mlp=read_mlp,
    load_inputs=load_grouped_inputs,
)

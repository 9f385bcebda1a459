"""Qwen3_5MoeForCausalLM: a text model of its own."""

from __future__ import annotations

from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.qwen3_5.config import MlpFields
from dp_runtime.models.qwen3_5.decoder import HybridDecoder, load_split_inputs, top_level


def read_mlp(fields: ConfigFields, num_layers: int) -> MlpFields:
    return MlpFields(norm_topk_prob=True, moe_layers=(True,) * num_layers, intermediate_size=0)


ARCHITECTURE = HybridDecoder(
    name="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    find_text=top_level,
    read_mlp=read_mlp,
    load_inputs=load_split_inputs,
)

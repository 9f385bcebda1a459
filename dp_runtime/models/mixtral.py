"""MixtralForCausalLM: plain attention, experts in every layer, top-k weights renormalised."""

from __future__ import annotations

from dp_runtime.layers.expert_layouts import ExpertNames
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.moe_decoder import Defaults, FamilyFields, MoeDecoder


def read_family(fields: ConfigFields, num_layers: int) -> FamilyFields:
    window = fields.integer("sliding_window") if "sliding_window" in fields else None
    return FamilyFields(
        attention_bias=False,
        norm_topk_prob=True,
        sliding_window=window,
        moe_layers=(True,) * num_layers,
    )


ARCHITECTURE = MoeDecoder(
    name="MixtralForCausalLM",
    model_type="mixtral",
    num_experts=("num_local_experts", "num_experts"),
    moe_intermediate_size="intermediate_size",
    qk_norm=False,
    defaults=Defaults(
        num_key_value_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5, rope_theta=1e6
    ),
    read_family=read_family,
    fixed={"use_sliding_window": (False, True)},  # its window counts either way
    moe_modules=("block_sparse_moe", "mlp"),
    expert_names=ExpertNames(gate="w1", up="w3", down="w2"),
)

"""Qwen3MoeForCausalLM: q/k norm per head, experts in every layer or in some."""

from __future__ import annotations

from dp_runtime.layers.expert_layouts import ExpertNames
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.moe_decoder import Defaults, FamilyFields, MoeDecoder


def read_family(fields: ConfigFields, num_layers: int) -> FamilyFields:
    fields.only("use_sliding_window", False)
    fields.skip(["sliding_window"])  # has no effect without use_sliding_window
    return FamilyFields(
        attention_bias=fields.boolean("attention_bias", False),
        norm_topk_prob=fields.boolean("norm_topk_prob", False),
        sliding_window=None,
        moe_layers=parse_moe_layers(fields, num_layers),
    )


def parse_moe_layers(fields: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    """Every decoder_sparse_step-th layer has experts, except those in mlp_only_layers."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.integers("mlp_only_layers")
    allowed = f"layers below num_hidden_layers {num_layers}"
    fields.require(max(dense, default=0) < num_layers, "mlp_only_layers", dense, allowed)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


ARCHITECTURE = MoeDecoder(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    num_experts=("num_experts", "num_local_experts"),
    moe_intermediate_size="moe_intermediate_size",
    qk_norm=True,
    defaults=Defaults(
        num_key_value_heads=4, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e4
    ),
    read_family=read_family,
    fixed={"use_qk_norm": (True,), "qk_norm": (True,), "qk_layernorm": (True,)},
    moe_modules=("mlp",),
    expert_names=ExpertNames("gate_proj", "up_proj", "down_proj"),
)

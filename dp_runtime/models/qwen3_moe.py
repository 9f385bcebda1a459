"""Qwen3MoeForCausalLM: q/k norm per head, experts in every layer or in some."""

from __future__ import annotations

from collections.abc import Callable

from dp_runtime.attention.spec import AttentionBackend
from dp_runtime.layers.experts import ExpertNames, Experts
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.mlp import DenseMLP
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.router import Router
from dp_runtime.models.causal_lm import CausalLM
from dp_runtime.models.config import ModelConfig, parse_head_dim
from dp_runtime.models.fp8_config import parse_fp8_experts
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.rope_config import max_context, parse_rope
from dp_runtime.weights.loader import WeightSource

EXPERT_NAMES = ExpertNames("gate_proj", "up_proj", "down_proj")


def parse_config(fields: ConfigFields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """Defaults are those of transformers' Qwen3MoeConfig where published files omit a field."""
    hidden, num_layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings", 32768)
    rope = parse_rope(fields, 10_000.0, max_positions)
    fields.only("hidden_act", "silu")
    fields.only("use_sliding_window", False)
    fields.skip(["sliding_window", "max_window_layers"])  # without effect: no sliding window
    fields.only("layer_types", ["full_attention"] * num_layers)
    local_experts = fields.get("num_local_experts")
    experts = "num_experts" if local_experts is None else "num_local_experts"
    return ModelConfig(
        architecture="Qwen3MoeForCausalLM",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=parse_head_dim(fields, hidden, num_heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        num_experts=fields.integer(experts),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        intermediate_size=fields.integer("intermediate_size"),
        moe_layers=parse_moe_layers(fields, num_layers),
        fp8_experts=parse_fp8_experts(
            fields, [f"model.layers.{i}.mlp.experts" for i in range(num_layers)], EXPERT_NAMES
        ),
        norm_topk_prob=fields.boolean("norm_topk_prob", False),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=fields.boolean("attention_bias", False),
        qk_norm=True,
        max_position_embeddings=max_context(rope, max_positions),
        eos_token_ids=eos_token_ids,
    )


def parse_moe_layers(fields: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    """Every decoder_sparse_step-th layer has experts, except those in mlp_only_layers."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.integers("mlp_only_layers")
    allowed = f"layers below num_hidden_layers {num_layers}"
    fields.require(max(dense, default=0) < num_layers, "mlp_only_layers", dense, allowed)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def build(
    config: ModelConfig,
    weights: WeightSource,
    sharding: RankSharding,
    attention: Callable[[int], AttentionBackend],
    moe: MoeKernels,
) -> CausalLM:
    def mlp(layer: int, prefix: str) -> MoeStage | DenseMLP:
        return load_mlp(config, layer, f"{prefix}.mlp", weights, sharding, moe)

    return CausalLM.load(config, weights, attention, mlp)


def load_mlp(
    config: ModelConfig,
    layer: int,
    name: str,
    weights: WeightSource,
    sharding: RankSharding,
    moe: MoeKernels,
) -> MoeStage | DenseMLP:
    """What follows the attention of a layer, whose weights are under `name`."""
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    if not config.moe_layers[layer]:
        return DenseMLP.load(weights, name, hidden, config.intermediate_size)
    gate = Linear.load(weights, {f"{name}.gate": config.num_experts}, hidden)
    shard = sharding.shard(config.num_experts, intermediate)
    fp8 = config.fp8_experts[layer] and moe.reads_fp8
    return MoeStage(
        Router(gate, config.num_experts_per_tok, config.norm_topk_prob),
        Experts.load(weights, f"{name}.experts", EXPERT_NAMES, shard, hidden, intermediate, fp8),
        moe,
    )

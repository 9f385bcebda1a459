"""MixtralForCausalLM: plain attention, experts in every layer, top-k weights renormalised."""

from __future__ import annotations

from collections.abc import Callable

from dp_runtime.attention.spec import AttentionBackend
from dp_runtime.layers.experts import ExpertNames, Experts
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.router import Router
from dp_runtime.models.causal_lm import CausalLM
from dp_runtime.models.config import ModelConfig, parse_head_dim
from dp_runtime.models.fp8_config import parse_fp8_experts
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.rope_config import max_context, parse_rope
from dp_runtime.weights.loader import WeightSource

EXPERT_NAMES = ExpertNames(gate="w1", up="w3", down="w2")


def parse_config(fields: ConfigFields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """Defaults are those of transformers' MixtralConfig where published files omit a field."""
    hidden, num_layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings", 131_072)
    intermediate = fields.integer("intermediate_size")
    rope = parse_rope(fields, 1e6, max_positions)
    fields.only("hidden_act", "silu")
    fields.only("sliding_window", None)
    fields.only("attention_bias", False)
    return ModelConfig(
        architecture="MixtralForCausalLM",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=parse_head_dim(fields, hidden, num_heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope=rope,
        num_experts=fields.integer("num_local_experts"),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=intermediate,
        intermediate_size=intermediate,
        moe_layers=(True,) * num_layers,
        fp8_experts=parse_fp8_experts(
            fields,
            [f"model.layers.{i}.block_sparse_moe.experts" for i in range(num_layers)],
            EXPERT_NAMES,
        ),
        norm_topk_prob=True,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=False,
        qk_norm=False,
        max_position_embeddings=max_context(rope, max_positions),
        eos_token_ids=eos_token_ids,
    )


def build(
    config: ModelConfig,
    weights: WeightSource,
    sharding: RankSharding,
    attention: Callable[[int], AttentionBackend],
    moe: MoeKernels,
) -> CausalLM:
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    shard = sharding.shard(config.num_experts, intermediate)

    def mlp(layer: int, prefix: str) -> MoeStage:
        name = f"{prefix}.block_sparse_moe"
        gate = Linear.load(weights, {f"{name}.gate": config.num_experts}, hidden)
        fp8 = config.fp8_experts[layer] and moe.reads_fp8
        return MoeStage(
            Router(gate, config.num_experts_per_tok, config.norm_topk_prob),
            Experts.load(
                weights, f"{name}.experts", EXPERT_NAMES, shard, hidden, intermediate, fp8
            ),
            moe,
        )

    return CausalLM.load(config, weights, attention, mlp)

"""MoeDecoder: a family of decoders with experts, given as the data in which it differs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.core.cache_spec import LayerState
from dp_runtime.layers.expert_layouts import ExpertNames, ExpertShape
from dp_runtime.layers.experts import Experts
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.mlp import DenseMLP
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.moe_router import Router
from dp_runtime.models.causal_lm import CausalLM
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.fp8_config import parse_fp8_exempt, parse_fp8_experts
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.rope_config import RopeFamily, max_context, parse_rope
from dp_runtime.weights.source import WeightSource

logger = logging.getLogger(__name__)

MAX_NAMED = 20  # unknown fields in the warning


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The values that transformers takes for fields that config.json does not have."""

    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float


@dataclass(frozen=True, kw_only=True)
class FamilyFields:
    """The fields that each family reads in a way of its own."""

    attention_bias: bool
    norm_topk_prob: bool
    sliding_window: int | None
    moe_layers: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class MoeDecoder:
    """Pre-norm attention with rotary positions, then experts or a dense MLP."""

    name: str
    model_type: str
    num_experts: tuple[str, ...]  # spellings of the field
    moe_intermediate_size: str  # name of the field
    qk_norm: bool
    defaults: Defaults
    read_family: Callable[[ConfigFields, int], FamilyFields]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # before known_fields'
    moe_modules: tuple[str, ...]  # names in a layer, the published one first
    expert_names: ExpertNames

    def parse_config(self, fields: ConfigFields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
        hidden, num_layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
        num_heads, defaults = fields.integer("num_attention_heads"), self.defaults
        positions = fields.integer("max_position_embeddings", defaults.max_position_embeddings)
        rope = parse_rope(fields, RopeFamily(defaults.rope_theta), positions)
        null_kv = fields.is_null("num_key_value_heads")
        family = self.read_family(fields, num_layers)
        fields.only("hidden_act", "silu")
        fields.only("layer_types", ["full_attention"] * num_layers)
        modules = [f"model.layers.{i}.{self.moe_modules[0]}.experts" for i in range(num_layers)]
        config = ModelConfig(
            architecture=self.name,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.integer(
                "num_key_value_heads", num_heads if null_kv else defaults.num_key_value_heads
            ),
            head_dim=parse_head_dim(fields, hidden, num_heads),
            rms_norm_eps=fields.number("rms_norm_eps", defaults.rms_norm_eps),
            rope=rope,
            num_experts=fields.integer(fields.one_of(*self.num_experts)),
            num_experts_per_tok=fields.integer("num_experts_per_tok"),
            moe_intermediate_size=fields.integer(self.moe_intermediate_size),
            intermediate_size=fields.integer("intermediate_size"),
            moe_layers=family.moe_layers,
            fp8_experts=parse_fp8_experts(fields, modules, self.expert_names),
            fp8_exempt=parse_fp8_exempt(fields),
            norm_topk_prob=family.norm_topk_prob,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            attention_bias=family.attention_bias,
            qk_norm=self.qk_norm,
            max_position_embeddings=max_context(rope, positions),
            sliding_window=family.sliding_window,
            eos_token_ids=eos_token_ids,
        )
        warn_of_unknown(fields.finish_known(self.fixed))
        return config

    def build(
        self,
        config: ModelConfig,
        weights: WeightSource,
        sharding: RankSharding,
        backend: AttentionBackend,
        moe: MoeKernels,
        states: Sequence[LayerState],
    ) -> CausalLM:
        def mlp(layer: int, prefix: str) -> MoeStage | DenseMLP:
            return self.load_mlp(config, layer, prefix, weights, sharding, moe)

        return CausalLM.load(config, weights, backend, mlp)

    def load_mlp(
        self,
        config: ModelConfig,
        layer: int,
        prefix: str,
        weights: WeightSource,
        sharding: RankSharding,
        moe: MoeKernels,
    ) -> MoeStage | DenseMLP:
        if not config.moe_layers[layer]:
            hidden, inner = config.hidden_size, config.intermediate_size
            return DenseMLP.load(weights, f"{prefix}.mlp", hidden, inner)
        modules = [f"{prefix}.{module}" for module in self.moe_modules]
        name = next((m for m in modules if weights.has(f"{m}.gate.weight")), modules[0])
        return load_moe_stage(config, layer, name, self.expert_names, weights, sharding, moe)


def load_moe_stage(
    config: ModelConfig,
    layer: int,
    prefix: str,
    names: ExpertNames,
    weights: WeightSource,
    sharding: RankSharding,
    moe: MoeKernels,
) -> MoeStage:
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    gate = Linear.load(weights, {f"{prefix}.gate": config.num_experts}, hidden)
    experts = Experts.load(
        weights,
        f"{prefix}.experts",
        names,
        ExpertShape(config.num_experts, hidden, intermediate),
        sharding.shard(config.num_experts, intermediate),
        fp8=config.fp8_experts[layer] and moe.reads_fp8,
    )
    return MoeStage(Router(gate, config.num_experts_per_tok, config.norm_topk_prob), experts, moe)


def parse_head_dim(fields: ConfigFields, hidden_size: int, num_heads: int) -> int:
    """Read `head_dim`, by default hidden_size / num_attention_heads."""
    if "head_dim" not in fields:
        fields.require(
            hidden_size % num_heads == 0, "num_attention_heads", num_heads,
            f"without head_dim, a divisor of hidden_size {hidden_size}",
        )  # fmt: skip
    return fields.integer("head_dim", hidden_size // num_heads)


@cache
def warn_of_unknown(names: tuple[str, ...]) -> None:
    if names:
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        logger.warning(
            "config.json has fields that are not known, and ignored: %s%s",
            ", ".join(names[:MAX_NAMED]), more,
        )  # fmt: skip

"""HybridConfig: a model whose layers attend or keep a recurrent state; how config.json tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dp_runtime.core.cache_spec import CacheSpec, PagedKv
from dp_runtime.layers.expert_layouts import ExpertNames
from dp_runtime.layers.gated_attention import GatedAttentionShape
from dp_runtime.layers.gated_delta_net import GatedDeltaNetShape
from dp_runtime.layers.rotary import rotated_dims
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.fp8_config import parse_fp8_exempt, parse_fp8_experts
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.rope_config import FRACTION, RopeFamily, max_context, parse_rope

EXPERTS = ExpertNames("gate_proj", "up_proj", "down_proj")
ROPE = RopeFamily(
    theta=10_000.0, fraction=0.25,
    irrelevant=("mrope_section", "mrope_interleaved"),  # three equal positions of a text token
)  # fmt: skip
KINDS = {"linear_attention": True, "full_attention": False}  # whether a layer keeps a state
TIED = "tie_word_embeddings"
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class HybridConfig(ModelConfig):
    delta_net: GatedDeltaNetShape
    delta_net_layers: tuple[bool, ...]  # [layer]; the others attend
    shared_expert_intermediate_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        assert len(self.delta_net_layers) == self.num_layers, "delta_net_layers: one per layer"

    @property
    def gated_attention(self) -> GatedAttentionShape:
        return GatedAttentionShape(
            self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim,
            rotated_dims(self.rope, self.head_dim), self.rms_norm_eps,
        )  # fmt: skip

    def cache_specs(
        self, page_size: int, kv_dtype: torch.dtype, dtype: torch.dtype, max_drafts: int = 0
    ) -> tuple[CacheSpec, ...]:
        kv = PagedKv(self.num_kv_heads, self.head_dim, page_size, kv_dtype)
        state = self.delta_net.state(dtype, max_drafts)
        return tuple(state if keeps_state else kv for keeps_state in self.delta_net_layers)


@dataclass(frozen=True, kw_only=True)
class MlpFields:
    """The fields of experts that each architecture reads in a way of its own."""

    norm_topk_prob: bool
    moe_layers: tuple[bool, ...]
    intermediate_size: int  # of layers without experts


ReadMlp = Callable[[ConfigFields, int], MlpFields]


def parse_hybrid(
    name: str,
    fields: ConfigFields,
    whole: ConfigFields,
    read_mlp: ReadMlp,
    eos_token_ids: tuple[int, ...],
) -> HybridConfig:
    """Read the fields of a text model, which may be a section of those of the whole."""
    hidden, num_layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
    positions = fields.integer("max_position_embeddings", 32768)
    rope, mlp = parse_rope(fields, ROPE, positions), read_mlp(fields, num_layers)
    head_dim, eps = fields.integer("head_dim", 256), fields.number("rms_norm_eps", 1e-6)
    rotated = rotated_dims(rope, head_dim)
    fields.require(
        rotated > 0 and rotated % 2 == head_dim % 2 == 0, FRACTION, rope.fraction,
        f"an even number of the {head_dim} dimensions of a head",
    )  # fmt: skip
    _require_fixed(fields)
    quantization = whole if "quantization_config" in whole else fields
    tied = fields.boolean(TIED, whole.boolean(TIED, False))
    whole.only(TIED, tied)
    modules = [f"model.layers.{layer}.mlp.experts" for layer in range(num_layers)]
    return HybridConfig(
        architecture=name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=fields.integer("num_key_value_heads", 2),
        head_dim=head_dim,
        rms_norm_eps=eps,
        rope=rope,
        num_experts=fields.integer(fields.one_of("num_experts", "num_local_experts")),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        intermediate_size=mlp.intermediate_size,
        moe_layers=mlp.moe_layers,
        fp8_experts=parse_fp8_experts(quantization, modules, EXPERTS),
        fp8_exempt=parse_fp8_exempt(quantization),
        norm_topk_prob=mlp.norm_topk_prob,
        tie_word_embeddings=tied,
        attention_bias=False,
        qk_norm=True,
        max_position_embeddings=max_context(rope, positions),
        sliding_window=None,
        eos_token_ids=eos_token_ids or fields.integers("eos_token_id"),
        delta_net=parse_delta_net(fields, hidden, eps),
        delta_net_layers=parse_layer_kinds(fields, num_layers),
        shared_expert_intermediate_size=fields.integer("shared_expert_intermediate_size"),
    )


def _require_fixed(fields: ConfigFields) -> None:
    for field, value in (("hidden_act", "silu"), ("attention_bias", False)):
        fields.only(field, value)
    fields.only("attn_output_gate", True)
    gate = fields.get("output_gate_type", "silu")
    fields.require(gate in ("silu", "swish"), "output_gate_type", gate, '"silu" or "swish"')


def parse_layer_kinds(fields: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    """Tell which layers keep a state: by `layer_types`, or all but every n-th."""
    interval = fields.integer("full_attention_interval", 4)
    default = ["linear_attention", "full_attention"]
    kinds = fields.get(
        "layer_types", [default[(layer + 1) % interval == 0] for layer in range(num_layers)]
    )
    ok = (
        isinstance(kinds, list)
        and len(kinds) == num_layers
        and all(k in list(KINDS) for k in kinds)
    )
    fields.require(ok, "layer_types", kinds, f"{num_layers} times one of {', '.join(KINDS)}")
    fields.require(
        "full_attention" in kinds, "layer_types", kinds, "at least one layer of full_attention"
    )
    return tuple(KINDS[kind] for kind in kinds)


def parse_delta_net(fields: ConfigFields, hidden: int, eps: float) -> GatedDeltaNetShape:
    k_heads = fields.integer("linear_num_key_heads", 16)
    v_heads = fields.integer("linear_num_value_heads", 32)
    fields.require(
        v_heads % k_heads == 0, "linear_num_value_heads", v_heads,
        f"a multiple of linear_num_key_heads {k_heads}",
    )  # fmt: skip
    dtype = fields.get("mamba_ssm_dtype", "float32")
    known = list(STATE_DTYPES)
    fields.require(dtype in known, "mamba_ssm_dtype", dtype, f"one of {', '.join(known)}")
    return GatedDeltaNetShape(
        hidden_size=hidden,
        num_k_heads=k_heads,
        num_v_heads=v_heads,
        head_k_dim=fields.integer("linear_key_head_dim", 128),
        head_v_dim=fields.integer("linear_value_head_dim", 128),
        conv_width=fields.integer("linear_conv_kernel_dim", 4, minimum=2),
        norm_eps=eps,
        state_dtype=STATE_DTYPES[dtype],
    )

"""HybridDecoder: the architectures of the family, given as the data in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dp_runtime.attention.backend import AttentionBackend, PagedAttention
from dp_runtime.core.cache_spec import LayerState
from dp_runtime.layers.gated_attention import GatedAttention
from dp_runtime.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetShape
from dp_runtime.layers.linear import Linear, Projection, load_projection
from dp_runtime.layers.mlp import DenseMLP
from dp_runtime.layers.moe import RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.rotary import Rotary
from dp_runtime.layers.shared_expert import SharedExpert, SharedExpertMoe
from dp_runtime.models.causal_lm import CausalLM, DecoderLayer, Mixer, Mlp, load_head
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.moe_decoder import load_moe_stage, warn_of_unknown
from dp_runtime.models.qwen3_5.config import EXPERTS, HybridConfig, ReadMlp, parse_hybrid
from dp_runtime.vision.encoder import VisionEncoder
from dp_runtime.weights.source import WeightSource

VISION_ROOT = "model.visual"
ROOTS = ("model", "model.language_model")  # of a text model's tensors; the latter beside a vision's


def text_only(whole: ConfigFields, text: ConfigFields, config: HybridConfig) -> HybridConfig:
    return config


@dataclass(frozen=True, kw_only=True)
class HybridDecoder:
    """Layers of gated attention or gated delta nets, each before experts or a dense MLP."""

    name: str
    model_type: str
    find_text: Callable[[ConfigFields], ConfigFields]  # where the fields of the text model are
    read_mlp: ReadMlp
    load_inputs: Callable[[GatedDeltaNetShape, WeightSource, str], Projection]  # of a delta net
    with_vision: Callable[[ConfigFields, ConfigFields, HybridConfig], HybridConfig] = text_only

    def parse_config(self, fields: ConfigFields, eos_token_ids: tuple[int, ...]) -> HybridConfig:
        text = self.find_text(fields)
        config = parse_hybrid(self.name, text, fields, self.read_mlp, eos_token_ids)
        config = self.with_vision(fields, text, config)
        sections = (fields,) if text is fields else (fields, text)
        warn_of_unknown(tuple(name for each in sections for name in each.finish_known({})))
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
        assert isinstance(config, HybridConfig), config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        root = next((r for r in ROOTS if weights.has(f"{r}.embed_tokens.weight")), ROOTS[0])
        embedding = weights.load(f"{root}.embed_tokens.weight", (config.vocab_size, hidden))
        vision = None
        if config.vision is not None:
            vision = VisionEncoder.load(config.vision, weights, VISION_ROOT)
        layers = []
        for layer in range(config.num_layers):
            prefix = f"{root}.layers.{layer}"
            mixer = self._load_mixer(config, layer, prefix, weights, backend, states)
            layers.append(load_layer(config, layer, prefix, mixer, weights, sharding, moe))
        return CausalLM(
            config,
            embedding,
            Rotary.from_config(config.rope, config.head_dim, weights.device),
            tuple(layers),
            RMSNorm.load_zero_centered(weights, f"{root}.norm", hidden, eps),
            Linear(load_head(config, weights, embedding), None),
            backend,
            vision=vision,
        )

    def _load_mixer(
        self,
        config: HybridConfig,
        layer: int,
        prefix: str,
        weights: WeightSource,
        backend: AttentionBackend,
        states: Sequence[LayerState],
    ) -> Mixer:
        if not config.delta_net_layers[layer]:
            return load_attention(config, prefix, weights, backend.layer(layer))
        name = f"{prefix}.linear_attn"
        inputs = self.load_inputs(config.delta_net, weights, name)
        return GatedDeltaNet.load(config.delta_net, weights, name, inputs, states[layer])


def load_layer(
    config: HybridConfig,
    layer: int,
    prefix: str,
    mixer: Mixer,
    weights: WeightSource,
    sharding: RankSharding,
    moe: MoeKernels,
) -> DecoderLayer:
    hidden, eps = config.hidden_size, config.rms_norm_eps
    norms = [
        RMSNorm.load_zero_centered(weights, f"{prefix}.{name}_layernorm", hidden, eps)
        for name in ("input", "post_attention")
    ]
    mlp = load_mlp(config, layer, f"{prefix}.mlp", weights, sharding, moe)
    return DecoderLayer(norms[0], mixer, norms[1], mlp)


def load_attention(
    config: HybridConfig, prefix: str, weights: WeightSource, paged: PagedAttention
) -> GatedAttention:
    return GatedAttention.load(config.gated_attention, weights, f"{prefix}.self_attn", paged)


def load_mlp(
    config: HybridConfig,
    layer: int,
    prefix: str,
    weights: WeightSource,
    sharding: RankSharding,
    moe: MoeKernels,
) -> Mlp:
    hidden = config.hidden_size
    if not config.moe_layers[layer]:
        return DenseMLP.load(weights, prefix, hidden, config.intermediate_size)
    routed = load_moe_stage(config, layer, prefix, EXPERTS, weights, sharding, moe)
    intermediate = config.shared_expert_intermediate_size
    return SharedExpertMoe(routed, SharedExpert.load(weights, prefix, hidden, intermediate))


def load_split_inputs(shape: GatedDeltaNetShape, weights: WeightSource, prefix: str) -> Projection:
    sizes = {
        "qkv": shape.channels, "z": shape.v_size, "b": shape.num_v_heads, "a": shape.num_v_heads,
    }  # fmt: skip
    parts = {f"{prefix}.in_proj_{name}": size for name, size in sizes.items()}
    return load_projection(weights, parts, shape.hidden_size)


def top_level(fields: ConfigFields) -> ConfigFields:
    return fields

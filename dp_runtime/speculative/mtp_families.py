"""The architectures whose checkpoints have an MTP layer, given as the data in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from dp_runtime.attention.backend import PagedAttention
from dp_runtime.layers.expert_layouts import ExpertNames
from dp_runtime.layers.moe import RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.models.causal_lm import DecoderLayer
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.qwen3_5.config import EXPERTS, HybridConfig
from dp_runtime.models.qwen3_5.decoder import load_attention, load_layer
from dp_runtime.models.qwen3_5.moe import ARCHITECTURE as QWEN3_5_MOE
from dp_runtime.models.qwen3_5.multimodal import ARCHITECTURE as QWEN3_5_MULTIMODAL
from dp_runtime.models.qwen3_5.next import ARCHITECTURE as QWEN3_NEXT
from dp_runtime.models.qwen3_moe import ARCHITECTURE as QWEN3_MOE
from dp_runtime.weights.source import WeightSource

LayerConfig = Callable[[ModelConfig, tuple[bool, ...]], ModelConfig]
LoadNorm = Callable[[WeightSource, str, int, float], RMSNorm]
LoadLayer = Callable[
    [ModelConfig, WeightSource, str, PagedAttention, RankSharding, MoeKernels], DecoderLayer
]


@dataclass(frozen=True, kw_only=True)
class MtpFamily:
    """An MTP layer attends as those of its target that attend, and keeps pages only."""

    find_text: Callable[[ConfigFields], ConfigFields]  # where the fields of the text model are
    expert_names: ExpertNames
    layer_config: LayerConfig  # of the target's config and the layer's fp8_experts
    load_norm: LoadNorm
    load_layer: LoadLayer


def _one_layer(target: ModelConfig, fp8_experts: tuple[bool, ...]) -> ModelConfig:
    return replace(target, num_layers=1, moe_layers=(True,), fp8_experts=fp8_experts)


def _one_attending_layer(target: ModelConfig, fp8_experts: tuple[bool, ...]) -> HybridConfig:
    assert isinstance(target, HybridConfig), target
    return replace(
        target,
        num_layers=1,
        moe_layers=(True,),
        fp8_experts=fp8_experts,
        delta_net_layers=(False,),
    )


def _load_plain(
    config: ModelConfig,
    weights: WeightSource,
    prefix: str,
    paged: PagedAttention,
    sharding: RankSharding,
    moe: MoeKernels,
) -> DecoderLayer:
    mlp = QWEN3_MOE.load_mlp(config, 0, prefix, weights, sharding, moe)
    return DecoderLayer.load(config, weights, prefix, paged, mlp)


def _load_gated(
    config: ModelConfig,
    weights: WeightSource,
    prefix: str,
    paged: PagedAttention,
    sharding: RankSharding,
    moe: MoeKernels,
) -> DecoderLayer:
    assert isinstance(config, HybridConfig), config
    mixer = load_attention(config, prefix, weights, paged)
    return load_layer(config, 0, prefix, mixer, weights, sharding, moe)


_PLAIN = MtpFamily(
    find_text=lambda fields: fields,
    expert_names=QWEN3_MOE.expert_names,
    layer_config=_one_layer,
    load_norm=RMSNorm.load,
    load_layer=_load_plain,
)


def _gated(find_text: Callable[[ConfigFields], ConfigFields]) -> MtpFamily:
    return MtpFamily(
        find_text=find_text,
        expert_names=EXPERTS,
        layer_config=_one_attending_layer,
        load_norm=RMSNorm.load_zero_centered,
        load_layer=_load_gated,
    )


FAMILIES: Mapping[str, MtpFamily] = {  # by the target's architecture
    QWEN3_MOE.name: _PLAIN,
    **{each.name: _gated(each.find_text) for each in (QWEN3_5_MOE, QWEN3_5_MULTIMODAL, QWEN3_NEXT)},
}

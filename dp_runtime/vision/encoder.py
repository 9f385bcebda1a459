"""VisionEncoder: a transformer over a rank's own images, which enters no collective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.core.device_copy import on_device
from dp_runtime.core.qk_norm_rope import CosSin, rotate
from dp_runtime.layers.linear import Linear
from dp_runtime.vision.config import VisionConfig
from dp_runtime.vision.patch_grid import PatchGrid, axial_angles, interpolated, patch_places
from dp_runtime.weights.source import WeightSource

EPS = 1e-6


@dataclass(frozen=True, eq=False)
class LayerNorm:
    weight: Tensor  # [size]
    bias: Tensor  # [size]

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS)

    @classmethod
    def load(cls, weights: WeightSource, name: str, size: int) -> LayerNorm:
        return cls(*(weights.load(f"{name}.{part}", (size,)) for part in ("weight", "bias")))


@dataclass(frozen=True, eq=False)
class VisionBlock:
    """Attention among all patches of an image, then an MLP; [patches, hidden] each."""

    attention_norm: LayerNorm
    qkv: Linear
    output: Linear
    mlp_norm: LayerNorm
    up: Linear
    down: Linear
    num_heads: int

    def __call__(self, x: Tensor, cos_sin: CosSin, lengths: Sequence[int]) -> Tensor:
        x = x + self.output(self._attend(self.qkv(self.attention_norm(x)), cos_sin, lengths))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

    def _attend(self, qkv: Tensor, cos_sin: CosSin, lengths: Sequence[int]) -> Tensor:
        q, k, v = qkv.view(len(qkv), 3, self.num_heads, -1).unbind(1)
        q, k = (rotate(part.float(), cos_sin).to(v.dtype) for part in (q, k))
        images = zip(*(torch.split(x.transpose(0, 1), list(lengths), 1) for x in (q, k, v)))
        attended = [F.scaled_dot_product_attention(*(p[None] for p in one))[0] for one in images]
        return torch.cat(attended, 1).transpose(0, 1).flatten(1)

    @classmethod
    def load(cls, config: VisionConfig, weights: WeightSource, prefix: str) -> VisionBlock:
        hidden, inner = config.hidden_size, config.intermediate_size
        return cls(
            LayerNorm.load(weights, f"{prefix}.norm1", hidden),
            Linear.load(weights, {f"{prefix}.attn.qkv": 3 * hidden}, hidden, bias=True),
            Linear.load(weights, {f"{prefix}.attn.proj": hidden}, hidden, bias=True),
            LayerNorm.load(weights, f"{prefix}.norm2", hidden),
            Linear.load(weights, {f"{prefix}.mlp.linear_fc1": inner}, hidden, bias=True),
            Linear.load(weights, {f"{prefix}.mlp.linear_fc2": hidden}, inner, bias=True),
            config.num_heads,
        )


@dataclass(frozen=True, eq=False)
class PatchMerger:
    """Makes one row of the text model of each token's patches."""

    norm: LayerNorm
    up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).view(-1, self.up.weight.shape[1])
        return self.down(F.gelu(self.up(tokens)))

    @classmethod
    def load(cls, config: VisionConfig, weights: WeightSource, prefix: str) -> PatchMerger:
        hidden, out = config.hidden_size, config.out_hidden_size
        merged = config.patches_per_token * hidden
        return cls(
            LayerNorm.load(weights, f"{prefix}.norm", hidden),
            Linear.load(weights, {f"{prefix}.linear_fc1": merged}, merged, bias=True),
            Linear.load(weights, {f"{prefix}.linear_fc2": out}, merged, bias=True),
        )


@dataclass(frozen=True, eq=False)
class VisionEncoder:
    """Qwen3.5's (transformers, `Qwen3_5MoeVisionModel`)."""

    config: VisionConfig
    patches: Linear  # of one frame: the frames of an image are equal, so their weights are summed
    positions: Tensor  # [positions_per_side^2, hidden]
    blocks: tuple[VisionBlock, ...]
    merger: PatchMerger

    @property
    def dtype(self) -> torch.dtype:
        return self.positions.dtype

    def __call__(self, pixels: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Encode normalised pixels [patches, patch_values] float32 -> [tokens, out_hidden]."""
        config = self.config
        places = on_device(patch_places(grids, config.merge_size).numpy(), pixels.device)
        x = self.patches(pixels.to(self.dtype))
        x = x + interpolated(self.positions, places, grids, config.positions_per_side).to(x.dtype)
        angles = axial_angles(places, config.head_dim)
        cos_sin = angles.cos(), angles.sin()
        lengths = [grid.num_patches for grid in grids]
        for block in self.blocks:
            x = block(x, cos_sin, lengths)
        return self.merger(x)

    def activation_bytes(self, num_tokens: int) -> int:
        config, size = self.config, self.dtype.itemsize
        hidden, inner = config.hidden_size, config.intermediate_size
        patches = num_tokens * config.patches_per_token
        qkv, wide = 3 * hidden * size, 2 * hidden * 4  # q and k are rotated in float32
        attention = qkv + 3 * wide + 2 * hidden * size
        mlp = 2 * inner * size
        start = (config.patch_values + 2 * hidden) * 4
        angles = config.head_dim * 4
        block = 3 * hidden * size + max(attention, mlp)
        return patches * (max(start, block) + angles)

    @classmethod
    def load(cls, config: VisionConfig, weights: WeightSource, prefix: str) -> VisionEncoder:
        hidden, side = config.hidden_size, config.patch_size
        kernel = (hidden, config.in_channels, config.num_frames, side, side)
        embed = weights.load(f"{prefix}.patch_embed.proj.weight", kernel)
        one_frame = embed.float().sum(2).flatten(1).to(embed.dtype)
        blocks = range(config.depth)
        return cls(
            config,
            Linear(one_frame, weights.load(f"{prefix}.patch_embed.proj.bias", (hidden,))),
            weights.load(f"{prefix}.pos_embed.weight", (config.positions_per_side**2, hidden)),
            tuple(VisionBlock.load(config, weights, f"{prefix}.blocks.{i}") for i in blocks),
            PatchMerger.load(config, weights, f"{prefix}.merger"),
        )

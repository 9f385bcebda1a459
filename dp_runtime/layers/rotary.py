"""Rotary position embedding (arXiv 2104.09864), with the scalings that published configs use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.core.qk_norm_rope import CosSin


@dataclass(frozen=True)
class RopeConfig:
    type: str = "default"  # default, linear, yarn, llama3
    theta: float = 10_000.0
    factor: float = 1.0  # linear, yarn, llama3
    original_max_position_embeddings: int = 0  # yarn, llama3
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    fraction: float = 1.0  # of a head's dimensions that are rotated
    mrope_section: tuple[int, ...] = ()  # pairs of dimensions turned by time, height and width


@dataclass(frozen=True, eq=False)
class Rotary:
    """Cosines and sines of positions, computed once per forward and handed to all layers."""

    inv_freq: Tensor  # [head_dim / 2] float32, by pair in `dim_order`; 0 where nothing is rotated
    attention_factor: float
    axes: Tensor  # [head_dim / 2] int64, which of a row's positions turns each pair of dimensions
    num_pairs: int  # of dimensions that are rotated, the first ones

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> CosSin:
        """Compute cos and sin of positions in float32, and round them to dtype.

        positions [rows] int64, or [3, rows] of time, height and width where these differ.
        """
        one = positions.dim() == 1
        of_pairs = positions[:, None] if one else positions.t().index_select(1, self.axes)
        angles = (of_pairs.float() * self.inv_freq)[:, None, :]
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            for each in (cos, sin):
                each[..., : self.num_pairs] *= self.attention_factor
        return cos.to(dtype), sin.to(dtype)

    @classmethod
    def from_config(cls, rope: RopeConfig, head_dim: int, device: torch.device) -> Rotary:
        rotated = rotated_dims(rope, head_dim)
        still = (0, (head_dim - rotated) // 2)
        frequencies = F.pad(inverse_frequencies(rope, rotated), still).to(device)
        axes = F.pad(mrope_axes(rope.mrope_section, rotated // 2), still).to(device)
        return cls(frequencies, rope.attention_factor, axes, rotated // 2)


def rotated_dims(rope: RopeConfig, head_dim: int) -> int:
    return int(head_dim * rope.fraction)


def mrope_axes(section: tuple[int, ...], num_pairs: int) -> Tensor:
    """Tell for each pair of dimensions whether time (0), height (1) or width (2) turns it.

    The three take turns (transformers calls it interleaved) until height and width have theirs.
    """
    axes = torch.zeros(num_pairs, dtype=torch.int64)
    for axis, count in enumerate(section[1:], 1):
        axes[axis : 3 * count : 3] = axis
    return axes


def dim_order(rotated: int, head_dim: int) -> Tensor:
    """Order a head's dimensions [head_dim] so that rotating its halves rotates the first alone.

    A model rotates the first dimensions as two halves of their own. In this order, which scores
    of queries and keys do not depend on, each half of the head begins with one of these.
    """
    dims, half, still = torch.arange(head_dim), rotated // 2, (head_dim - rotated) // 2
    first, second, rest = dims.tensor_split([half, rotated])
    return torch.cat((first, rest[:still], second, rest[still:]))


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Compute theta^(-2i / head_dim), scaled, [head_dim / 2] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    match rope.type:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "yarn":
            ramp = yarn_ramp(rope, head_dim)
            return frequencies / rope.factor * ramp + frequencies * (1 - ramp)
        case "llama3":
            return llama3_frequencies(rope, frequencies)
        case _:
            raise AssertionError(f"rope type {rope.type}")


def yarn_ramp(rope: RopeConfig, head_dim: int) -> Tensor:
    """Compute how far each frequency is interpolated, 0 to 1 (arXiv 2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        """Find the dimension that turns this often within the original context."""
        context = rope.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # the ramp is a step where both ends meet
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def llama3_frequencies(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Slow long waves by `factor`, keep short ones, blend between (Llama 3.1, `apply_scaling`)."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies

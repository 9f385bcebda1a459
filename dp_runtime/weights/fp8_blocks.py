"""e4m3 weights with a scale for each block of 128 x 128, the convention of DeepSeek and Qwen.

A weight is its e4m3 value in `X` times the scale of its block in `X_scale_inv`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.core.e4m3 import E4M3_MAX
from dp_runtime.core.e4m3 import quantize as to_e4m3

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"


def num_blocks(size: int) -> int:
    return -(-size // BLOCK)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Turn [rows, columns] into e4m3 and float32 scales [blocks of rows, blocks of columns]."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(num_blocks(rows), BLOCK, num_blocks(columns), BLOCK)
    scales = blocks.abs().amax((1, 3)) / E4M3_MAX
    scales = torch.where(scales > 0, scales, 1.0)
    values = to_e4m3(blocks, scales[:, None, :, None])
    return values.flatten(2).flatten(0, 1)[:rows, :columns], scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    rows, columns = values.shape[-2:]
    by_row = scales.float().repeat_interleave(BLOCK, -2)[..., :rows, :]
    return values.float() * by_row.repeat_interleave(BLOCK, -1)[..., :columns]


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return *shape[:-2], num_blocks(shape[-2]), num_blocks(shape[-1])


def scale_part(part: tuple[slice, ...]) -> tuple[slice, ...]:
    return *part[:-2], block_part(part[-2]), block_part(part[-1])


def block_part(part: slice) -> slice:
    assert part.step is None, "blocks are contiguous"
    start, stop = part.start or 0, part.stop
    assert start % BLOCK == 0, f"{part} begins within a block of {BLOCK}"
    return slice(start // BLOCK, None if stop is None else num_blocks(stop))


@dataclass(frozen=True, eq=False)
class ExpertScales:
    gate_up: Tensor  # [local_experts, 2 * intermediate / 128, hidden / 128]
    down: Tensor  # [local_experts, hidden / 128, intermediate / 128]

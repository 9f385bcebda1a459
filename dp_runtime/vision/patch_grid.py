"""Where the patches of images lie: those of a token side by side, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dp_runtime.core.device_copy import on_device

THETA = 10_000.0


class PatchGrid(NamedTuple):
    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns


def patch_places(grids: Sequence[PatchGrid], merge_size: int) -> Tensor:
    """Return the row and the column of every patch of some images, [patches, 2] int64."""
    places = []
    for rows, columns in grids:
        both = torch.stack(
            torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1
        )
        blocks = both.view(rows // merge_size, merge_size, columns // merge_size, merge_size, 2)
        places.append(blocks.transpose(1, 2).reshape(-1, 2))
    return torch.cat(places)


def interpolated(
    learned: Tensor, places: Tensor, grids: Sequence[PatchGrid], per_side: int
) -> Tensor:
    """Stretch learned positions [per_side^2, hidden] over each grid -> float32 [patches, hidden]"""
    counts = torch.tensor([grid.num_patches for grid in grids])
    last = (torch.tensor(grids) - 1).clamp(min=1).repeat_interleave(counts, 0)
    at = places.float() * (per_side - 1) / on_device(last.numpy(), places.device)
    low = at.floor().long()
    part = at - low
    high = (low + 1).clamp(max=per_side - 1)
    total = learned.new_zeros(len(places), learned.shape[1], dtype=torch.float32)
    for row, row_weight in ((low[:, 0], 1 - part[:, 0]), (high[:, 0], part[:, 0])):
        for column, weight in ((low[:, 1], 1 - part[:, 1]), (high[:, 1], part[:, 1])):
            total += (row_weight * weight)[:, None] * learned[row * per_side + column].float()
    return total


def axial_angles(places: Tensor, head_dim: int) -> Tensor:
    """Compute a rotation by row and by column, [patches, 1, head_dim / 2] float32."""
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=places.device) / half
    angles = places.float()[:, :, None] * (1.0 / THETA**exponents)  # [patches, 2, head_dim / 4]
    return angles.flatten(1)[:, None]

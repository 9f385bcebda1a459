"""VisionConfig: the facts of a vision encoder that its layers need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int  # pixels of a side
    num_frames: int  # that a patch is deep; an image is so many equal ones
    merge_size: int  # patches of a token's side
    positions_per_side: int  # of the square of learned positions
    out_hidden_size: int  # of the text model
    image_token_ids: tuple[int, int, int]  # before an image in a text, for it, and after it

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patches_per_token(self) -> int:
        return self.merge_size**2

    @property
    def patch_values(self) -> int:
        """Count the values of a patch of one frame."""
        return self.in_channels * self.patch_size**2

"""DeltaRows: what the convolution leaves for the delta rule."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeadShape:
    num_k_heads: int
    num_v_heads: int  # v head h reads k head h // (num_v_heads // num_k_heads)
    head_k_dim: int
    head_v_dim: int

    @property
    def channels(self) -> int:  # of q, k and v
        return 2 * self.num_k_heads * self.head_k_dim + self.num_v_heads * self.head_v_dim


@dataclass(frozen=True, eq=False)
class DeltaRows:
    """Rows of the pass, then max_drafts of each request: the accepted drafts of the pass before.

    What is behind the accepted ones was never written.
    """

    qkv: Tensor  # [rows + requests * max_drafts, channels], convolved
    gates: Tensor  # [rows + requests * max_drafts, 2, num_v_heads] float32: log of the decay; beta
    num_rows: int
    max_drafts: int

"""FutureTokens: tokens and hidden states that only the device knows when a pass is launched."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class FutureTokens:
    """Tokens that a batch's future_token_index index, and hidden states of its rows."""

    token_ids: Tensor  # [n] int64: what the last step sampled, this step drafted or sampled
    hidden: Tensor  # [rows, hidden] for a draft model, else [0, 0]
    num_rejected: Tensor | None = None  # [requests] int64: bounds minus true lengths

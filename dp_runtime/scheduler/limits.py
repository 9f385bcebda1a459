"""Limits: what a step and a sequence of one rank may hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a step and a sequence of one rank may hold.

    max_drafts: the most tokens of a request that a step drafts. The last of them may lie behind
    max_model_len, which no accepted one does: pages are reserved for all.
    """

    max_num_requests: int
    max_num_tokens: int
    max_model_len: int
    max_drafts: int = 0

    @property
    def max_cached_len(self) -> int:
        """Positions that a sequence may need pages for."""
        return self.max_model_len + self.max_drafts

    @property
    def max_decode_rows(self) -> int:
        """Rows of a pass that all requests of a rank have while none prefills."""
        return self.max_num_requests * (1 + self.max_drafts)

"""How the attention kernel over shares of keys is tiled, and its limit."""

from __future__ import annotations

from dataclasses import dataclass

MAX_REQUESTS = 256  # every program sums up their lengths
MOST_MULTIPROCESSORS = 132  # of a GPU of capability 9.0


@dataclass(frozen=True)
class SplitTile:
    block: int = 64  # keys read at once, of one page
    num_warps: int = 4
    num_stages: int = 3
    per_multiprocessor: int = 3  # programs
    parts: int = 1  # of a head of a request, that are read at once to sum them up: a power of 2

    def max_part_bytes(self, rows: int, num_kv_heads: int, head_dim: int) -> int:
        """Count what programs find at most; rows: query rows of a KV head."""
        parts = MOST_MULTIPROCESSORS * self.per_multiprocessor + MAX_REQUESTS * num_kv_heads
        return parts * rows * (head_dim + 2) * 4

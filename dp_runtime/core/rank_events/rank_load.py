"""RankLoad: how busy a rank was when it was last asked for its outputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankLoad:
    num_running: int
    num_waiting: int  # requests in its queue, or on their way there
    free_pages: int

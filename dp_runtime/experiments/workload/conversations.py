"""Conversations: turns whose prompts are made of segments, each a pure function of its key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dp_runtime.errors import require

FIRST_TOKEN = 100  # keeps clear of special tokens, where the vocabulary has room for that


@dataclass(frozen=True)
class Segment:
    """So many tokens that follow from the key: equal segments are prefixes that can be shared."""

    key: tuple[int, ...]
    num_tokens: int
    drawn_tokens: int = 0  # of which it has the first; 0: num_tokens

    def token_ids(self, vocab_size: int) -> list[int]:
        low = min(FIRST_TOKEN, vocab_size // 2)
        rng = np.random.default_rng(self.key)
        drawn = rng.integers(low, vocab_size, self.drawn_tokens or self.num_tokens)
        tokens: list[int] = drawn[: self.num_tokens].tolist()
        return tokens


@dataclass(frozen=True)
class Turn:
    """What is said next, after all that was said before, and how long the answer is."""

    segments: tuple[Segment, ...]
    output_len: int
    think_s: float = 0.0  # after the answer before

    @property
    def num_tokens(self) -> int:  # new ones of the prompt
        return sum(segment.num_tokens for segment in self.segments)

    def token_ids(self, vocab_size: int) -> list[int]:
        return [token for each in self.segments for token in each.token_ids(vocab_size)]


@dataclass(frozen=True)
class Conversation:
    """Requests of which each follows the answer to the one before; most have one turn."""

    at_s: float  # after the start
    dp_rank: int | None  # that it is pinned to
    turns: tuple[Turn, ...]

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the longest prompt and its answer."""
        return sum(turn.num_tokens + turn.output_len for turn in self.turns)

    @property
    def prompt_lens(self) -> tuple[int, ...]:  # [turn] what came before included
        before, lens = 0, []
        for turn in self.turns:
            lens.append(before + turn.num_tokens)
            before += turn.num_tokens + turn.output_len
        return tuple(lens)


def check_load(
    conversations: Sequence[Conversation], max_model_len: int | None, max_queued_requests: int
) -> None:
    """Raise ValueError for a load that an engine with these limits would refuse."""
    longest = max(each.num_tokens for each in conversations)
    allowed = f"at most {max_model_len} tokens of a prompt and its output (max_model_len)"
    require(max_model_len is None or longest <= max_model_len, "workload", longest, allowed)
    most = max(Counter(each.at_s for each in conversations).values())
    allowed = f"at most {max_queued_requests} requests at once (max_queued_requests)"
    require(most <= max_queued_requests, "workload", most, allowed)

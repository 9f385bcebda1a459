"""Limits of a step and of a sequence on one rank."""

from __future__ import annotations

from dataclasses import dataclass

MIN_CHECKPOINTS = 8  # by default; few requests, too, have prompts and texts to come back to


def default_checkpoints(max_num_requests: int) -> int:
    return max(MIN_CHECKPOINTS, -(-max_num_requests // 4))


def most_requests(num_slots: int) -> int:
    """Count the requests that have a slot each beside their default checkpoints."""
    return min(num_slots - MIN_CHECKPOINTS, num_slots * 4 // 5)


@dataclass(frozen=True)
class Limits:
    max_num_requests: int
    max_num_tokens: int
    max_model_len: int
    max_drafts: int = 0  # of a request in a step
    keeps_state: bool = False  # layers have a recurrent state, whose memory is dear
    max_image_tokens: int = 0  # of one image; 0: none are served
    num_image_slots: int = 0  # tokens of images whose features are kept
    num_state_checkpoints: int = 0  # states that a prefix cache keeps
    state_track_interval: int = 0  # tokens of an output from one of them to the next; 0: none
    min_awaited_tokens: int = 256  # that another request computes; waiting for fewer costs more

    @property
    def max_cached_len(self) -> int:
        """Count positions that a sequence needs pages for; drafts may lie beyond max_model_len."""
        return self.max_model_len + self.max_drafts

    @property
    def max_decode_rows(self) -> int:
        return self.max_num_requests * (1 + self.max_drafts)

    @property
    def max_encoded_tokens(self) -> int:
        """Count the most tokens of images that a step encodes."""
        return max(self.max_num_tokens, self.max_image_tokens) if self.max_image_tokens else 0

    @property
    def num_table_rows(self) -> int:
        """Count running requests, and as many that stopped while a step with them is in flight.

        NOTE: a row has a slot in the recurrent states. With those, who arrives waits for a row.
        """
        return self.max_num_requests if self.keeps_state else 2 * self.max_num_requests

    @property
    def num_state_slots(self) -> int:
        """Count the null slot, one of each row, and those of a prefix cache; or none."""
        return self.checkpoint_slots.stop if self.keeps_state else 0

    @property
    def page_table_sizes(self) -> tuple[int, int, range]:
        return self.num_table_rows, self.max_cached_len, self.checkpoint_slots

    @property
    def checkpoint_slots(self) -> range:
        first = 1 + self.num_table_rows
        return range(first, first + self.num_state_checkpoints)

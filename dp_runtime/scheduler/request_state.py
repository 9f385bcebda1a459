"""RequestState: a request that a rank is serving, and what the host knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dp_runtime.core.batch import Int64
from dp_runtime.core.request import FinishReason, RankRequest

NO_ROW = -1


@dataclass(eq=False, slots=True)
class RequestState:
    """One request on its rank: its committed tokens, and where it stands.

    What every step changes lies in the RequestTable, in `row`, while the request holds pages.
    """

    request: RankRequest
    max_outputs: int
    prompt: Int64 = field(init=False)
    outputs: list[int] = field(default_factory=list)  # committed
    row: int = NO_ROW
    running: bool = False  # else it waits, or has ended
    num_scored: int = 0  # prompt positions whose log probabilities were asked for
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.prompt = np.array(self.request.prompt_token_ids, np.int64)

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.outputs)

    def tokens(self, start: int, end: int) -> Int64:
        """Tokens [start, end) of prompt and committed outputs."""
        if end <= self.num_prompt:
            return self.prompt[start:end]
        return np.concatenate([self.prompt, np.array(self.outputs, np.int64)])[start:end]

"""LiveRequest: a request that a rank is serving, and how far launched steps have brought it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dp_runtime.batch import Int32, Int64
from dp_runtime.request import FinishReason, RankRequest


@dataclass(eq=False)
class LiveRequest:
    """The state of one request on its rank.

    Two clocks run here: `num_tokens` counts committed tokens, `num_computed` and `num_pending`
    are *projected*, they include steps that were launched and not yet committed.
    """

    request: RankRequest
    arrival: int
    max_outputs: int
    max_pages: int
    tokens: Int64 = field(init=False)  # [prompt + max_outputs]
    page_ids: Int32 = field(init=False)  # [max_pages], the first num_pages are owned
    num_tokens: int = field(init=False)  # prompt and committed outputs
    running: bool = False  # else it waits, or has ended
    num_pages: int = 0
    num_computed: int = 0  # tokens in the cache once all launched steps are done
    num_pending: int = 0  # tokens that launched steps sample
    num_launched: int = 0  # launched steps with rows of this request
    num_scored: int = 0  # prompt positions whose log probabilities were asked for
    source_row: int = -1  # its sampled token's index in the last launched step
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        prompt = self.request.prompt_token_ids
        self.num_tokens = len(prompt)
        self.tokens = np.zeros(len(prompt) + self.max_outputs, np.int64)
        self.tokens[: len(prompt)] = prompt
        self.page_ids = np.zeros(self.max_pages, np.int32)

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_outputs(self) -> int:
        """Output tokens, those that launched steps sample included."""
        return self.num_tokens + self.num_pending - self.num_prompt

    @property
    def num_needed(self) -> int:
        """Tokens to feed before the next one can be sampled; 0 if no more will be."""
        if self.finish_reason or self.num_outputs >= self.max_outputs:
            return 0
        return self.num_tokens + self.num_pending - self.num_computed

    @property
    def prefilling(self) -> bool:
        """It has more to feed than the token that was sampled last."""
        return self.num_needed > 1 or self.num_computed < self.num_prompt

    @property
    def pages(self) -> list[int]:
        return [int(page) for page in self.page_ids[: self.num_pages]]

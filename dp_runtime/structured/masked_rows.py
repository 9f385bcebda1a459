"""MaskedRows: the rows of a step that requests with grammars sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dp_runtime.core.device_copy import HostCopy
from dp_runtime.sampling.sampler import Sampled
from dp_runtime.structured.grammar_follower import GrammarFollower


@dataclass(frozen=True, eq=False)
class RequestRows:
    """The row of a request, and those after each of its drafts."""

    follower: GrammarFollower
    number: int  # of the request among those of the step that sample
    rows: range
    output_index: int  # of the first

    @property
    def num_drafts(self) -> int:
        return len(self.rows) - 1


@dataclass(frozen=True, eq=False)
class MaskedRows:
    requests: Sequence[RequestRows]
    drafts: HostCopy | None  # [verifications, drafts], where any are verified
    sampled: Sampled | None = None

    def drafts_of(self, request: RequestRows) -> list[int]:
        """Wait for the drafts that a request verifies."""
        if self.drafts is None or not request.num_drafts:
            return []
        (drafts,) = self.drafts.wait()
        chain: list[int] = drafts[request.number].tolist()
        return chain

    def follow(self) -> None:
        """Wait for what was sampled, and advance the grammars over what became outputs."""
        assert self.sampled is not None, "the rows were sampled"
        sampled, _, *accepted = self.sampled.copy.wait()
        token_ids: list[int] = sampled.tolist()
        for request in self.requests:
            first, count = request.rows.start, 1
            if request.num_drafts:
                count += int(accepted[0][request.number])
            request.follower.advance(token_ids[first : first + count])

"""GrammarFollower: what the grammar of one request allows after its outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dp_runtime.core.request import RankRequest
from dp_runtime.structured.grammar import one_error

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(eq=False)
class GrammarFollower:
    """Goes on with each output of a request, up to its end."""

    matcher: LLMatcher
    request: RankRequest
    num_outputs: int = 0
    ended: bool = False  # any token may be sampled, for nobody will see it

    @property
    def ignore_eos(self) -> bool:
        return self.request.params.ignore_eos

    def advance(self, token_ids: Iterable[int]) -> None:
        for token in token_ids:
            if self.ended:
                return
            self.num_outputs += 1
            if token in self.request.stop_token_ids:
                self.ended = True
            else:
                self.matcher.consume_token(token)  # once it can't, it stays in error

    @property
    def error(self) -> str:
        """Tell why the grammar can't be followed any more, such as for a limit; empty if it can."""
        return one_error(self.matcher.get_error())

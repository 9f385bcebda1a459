"""GrammarFollower: what the grammar of one request allows after its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    failure: str = ""  # what the library raised for it

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
                self.guarded(self.matcher.consume_token, token)  # errors stay

    @property
    def error(self) -> str:
        """Tell why the grammar can't be followed any more, such as for a limit; empty if it can."""
        return self.failure or one_error(self.matcher.get_error())

    def guarded(self, work: Callable[..., object], *arguments: object) -> None:
        """Do work for this request alone, which fails if that raises."""
        try:
            work(*arguments)
        except BaseException as error:  # a panic of the library is no Exception
            self.failure = self.failure or one_error(f"{type(error).__name__}: {error}")

"""Listeners: who hears of what ranks do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dp_runtime.core.membership import Transition
from dp_runtime.core.rank_events.kv_events import KvEvent
from dp_runtime.core.rank_events.rank_load import RankLoad
from dp_runtime.core.request import RankRequest, RequestUpdate

Resume = Callable[[dict[int, list[RankRequest]]], None]  # what each rank begins or goes on with


@dataclass(frozen=True, eq=False)
class Listeners:
    """Who hears of what ranks do, in threads of their group."""

    on_progress: Callable[[int, Sequence[RequestUpdate]], None]  # dp_rank, what it did
    on_failure: Callable[[BaseException], None]  # of all of them, once
    on_transition: Callable[[Transition, Resume], int]  # losses put down to a request
    on_load: Callable[[int, RankLoad], None]  # dp_rank, how busy it is
    on_kv_events: Callable[[int, Sequence[KvEvent]], None]  # before the progress that they led to

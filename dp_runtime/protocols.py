"""What others implement for the runtime: collectives, the step board, rank groups, attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from dp_runtime.agreement import StepRecord
from dp_runtime.layers.rotary import HeadRotation
from dp_runtime.metadata import AttentionMetadata
from dp_runtime.request import RankRequest, RequestProgress
from dp_runtime.status import ModelInfo, RankHealth
from dp_runtime.trace import StepTrace, Totals

Counts = tuple[int, ...]


class RowCollective(Protocol):
    """Moves rows of a matrix between ranks; all ranks call the same methods in the same order.

    `counts` are known to every rank alike. Every wait ends within the implementation's timeout
    with CollectiveTimeout, or with CollectiveAborted after an abort. Nothing moves, and nobody
    waits, where the counts sum to 0.
    """

    dp_rank: int
    dp_size: int

    @property
    def waited_s(self) -> float:
        """Seconds this rank has spent waiting for peers, since the start."""

    def counts(self, values: Sequence[int]) -> tuple[Counts, ...]:
        """All ranks' values (equally many on each rank), [rank][value]."""

    def gather_rows(self, rows: Tensor, counts: Counts) -> Tensor:
        """Own rows [counts[dp_rank], hidden] -> all ranks' rows [sum(counts), hidden]."""

    def reduce_scatter_rows(self, rows: Tensor, counts: Counts) -> Tensor:
        """Partial sums [sum(counts), hidden] -> own rows [counts[dp_rank], hidden], summed."""

    def barrier(self) -> None:
        """Return once all ranks have called it."""

    def watch(self, what: str) -> None:
        """Bound the device's wait for what was launched so far without this object's doing.

        A graph's replay is such a launch. Nothing to do where the host waits for every call.
        """

    def check(self) -> None:
        """Raise CollectiveTimeout or CollectiveAborted if the collective has failed.

        Rows may still move after a call has returned (on a GPU): once the host has waited for
        what was computed from them, this tells whether it is worth anything.
        """

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank with CollectiveAborted; callable from any thread."""

    def close(self) -> None:
        """Release what this rank holds; callable more than once."""


@runtime_checkable
class CountedCollective(RowCollective, Protocol):
    """A RowCollective that also moves rows by counts which only the device knows, for graphs.

    layout [2, dp_size] int32 on the device: where each rank's rows begin among all ranks' rows,
    which are slot_rows for each rank, and how many of them are real: the first ones. Only these
    cross.
    """

    def gather_counted(self, rows: Tensor, layout: Tensor, slot_rows: int, poison: bool) -> Tensor:
        """Own rows [own <= slot_rows, hidden] -> all ranks' rows [dp_size * slot_rows, hidden].

        Those that are not real are undefined, or NaN with poison.
        """

    def reduce_scatter_counted(self, partial: Tensor, layout: Tensor, own_rows: int) -> Tensor:
        """Partial sums [dp_size * slot_rows, hidden] -> own rows [own_rows, hidden], summed.

        Those that are not real are 0.
        """


class StepBoard(Protocol):
    """Where ranks post their step records and read everyone's; one reader thread per rank."""

    dp_rank: int
    dp_size: int

    @property
    def waited_s(self) -> float:
        """Seconds this rank has spent waiting for peers' records, since the start."""

    def exchange(self, record: StepRecord) -> tuple[StepRecord, ...]:
        """Post this rank's next record and return the records all ranks posted in that turn.

        Turns are counted by the board, so that records which differ in epoch, step or program
        still meet. Raises CollectiveTimeout naming the ranks that are missing.
        """

    def idle(self, timeout_s: float) -> None:
        """Sleep until `wake`, until a peer posts its next record, or for timeout_s at most.

        All ranks call it after the same exchanges, if only for 0 seconds: the first rank to post
        again then knows that others sleep.
        """

    def wake(self) -> None:
        """End this rank's current or next `idle`; callable from any thread."""

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank with CollectiveAborted; callable from any thread."""

    def close(self) -> None:
        """Release what this rank holds; callable more than once."""


class AttentionBackend(Protocol):
    """Attention of one layer over the paged cache it is bound to.

    It sees rows and metadata, and can reach neither a batch, an agreement nor a config.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Append k and v to the cache, then attend causally.

        q [rows, num_heads, head_dim], k and v [rows, num_kv_heads, head_dim]
        -> [rows, num_heads, head_dim].
        """

    def attend_qkv(
        self, qkv: Tensor, rotation: HeadRotation, metadata: AttentionMetadata
    ) -> Tensor:
        """The same of unrotated rows, on a GPU: one kernel makes q and appends k and v.

        qkv [rows, num_heads + 2 * num_kv_heads, head_dim] -> [rows, num_heads, head_dim].
        """


ProgressListener = Callable[[int, Sequence[RequestProgress]], None]  # dp_rank, what it did
FailureListener = Callable[[BaseException], None]


class RankGroup(Protocol):
    """The running ranks as the engine sees them, whatever kind of process they are."""

    model: ModelInfo

    def listen(self, on_progress: ProgressListener, on_failure: FailureListener) -> None:
        """Deliver outputs and the first failure, each from the group's own threads."""

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        """Queue requests on a rank; does not wait."""

    def abort(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        """Stop requests of a rank; does not wait."""

    def health(self) -> tuple[RankHealth, ...]:
        """The state of every rank, also of those that do not answer."""

    def trace(self) -> tuple[StepTrace, ...]:
        """The steps that the ranks remember, ordered by step and rank."""

    def totals(self) -> tuple[Totals, ...]:
        """What every rank has counted since the start."""

    def close(self) -> None:
        """Stop all ranks and release their processes; callable more than once."""

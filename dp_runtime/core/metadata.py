"""AttentionMetadata: what an attention kernel reads, built from a LocalBatch alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import NULL_PAGE, Int32, LocalBatch
from dp_runtime.core.transfer import all_on_device
from dp_runtime.errors import ContractViolation


@dataclass(frozen=True)
class PageGeometry:
    """The shape of a rank's page pool; page 0 is the null page."""

    num_pages: int
    page_size: int

    def __post_init__(self) -> None:
        assert self.num_pages * self.page_size <= 2**31, "a slot's number is an int32 on the device"


@dataclass(frozen=True)
class Place:
    """Where in a run something happened, for messages."""

    dp_rank: int
    step_id: int
    pass_kind: str

    def __str__(self) -> str:
        return f"rank {self.dp_rank}, step {self.step_id}, pass {self.pass_kind}"


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """The real sequences of one pass on one rank; `batch_size` is derived, never set.

    The host mirrors hold the same numbers as the device tensors.
    """

    cu_seqlens_q: Tensor  # [requests + 1] int32
    seq_lens: Tensor  # [requests] int32
    page_table: Tensor  # [requests, pages] int32
    slot_mapping: Tensor  # [rows] int32
    query_lens_host: Int32  # [requests]
    seq_lens_host: Int32  # [requests]
    page_table_host: Int32  # [requests, pages]
    place: Place  # for messages only

    @property
    def batch_size(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        return self.slot_mapping.shape[0]

    @classmethod
    def build(
        cls,
        batch: LocalBatch,
        pages: PageGeometry,
        place: Place,
        device: torch.device,
        num_rejected: Tensor | None = None,
    ) -> AttentionMetadata:
        """Check the batch's values once on the host and copy them to the device.

        num_rejected [n] int64, on the device, if the batch's lengths are upper bounds: how much
        shorter the first n sequences, which have equally many rows, really are. The host mirrors
        keep the bounds.
        Raises ContractViolation if a page id, a length or an offset does not fit the pool.
        """
        check_values(batch, pages, place)
        cu_seqlens_q = np.zeros(batch.num_requests + 1, np.int32)
        np.cumsum(batch.query_lens, out=cu_seqlens_q[1:])
        slots = batch.slot_mapping.astype(np.int32)
        arrays = (cu_seqlens_q, batch.seq_lens, batch.page_table, slots)
        cu_seqlens, seq_lens, page_table, slot_mapping = all_on_device(arrays, device)
        if num_rejected is not None:
            length = int(batch.query_lens[0])
            size = pages.page_size
            rewind_sequences(num_rejected, length, seq_lens, slot_mapping, page_table, size)
        return cls(
            cu_seqlens_q=cu_seqlens,
            seq_lens=seq_lens,
            page_table=page_table,
            slot_mapping=slot_mapping,
            query_lens_host=batch.query_lens,
            seq_lens_host=batch.seq_lens,
            page_table_host=batch.page_table,
            place=place,
        )


def rewind_sequences(
    num_rejected: Tensor,
    query_len: int,
    seq_lens: Tensor,
    slots: Tensor,
    page_table: Tensor,
    page_size: int,
) -> None:
    """Shorten the first sequences, in place, by `num_rejected` [n], and move their rows' slots.

    Each of them has query_len rows. seq_lens [requests], slots [rows], page_table [requests,
    pages]; a slot is page * page_size + offset.
    """
    count = len(num_rejected)
    lengths = seq_lens[:count]
    lengths -= num_rejected
    offsets = torch.arange(query_len, device=num_rejected.device)
    positions = (lengths[:, None] - query_len) + offsets
    pages = page_table[:count].gather(1, positions // page_size)
    slots[: count * query_len] = (pages * page_size + positions % page_size).flatten()


# The ufuncs themselves: an array's own min, max and all go through a layer of Python to them.
_least, _most, _all = np.minimum.reduce, np.maximum.reduce, np.logical_and.reduce


def check_values(batch: LocalBatch, pages: PageGeometry, place: Place) -> None:
    """Compare every value a kernel will trust with the pool; flashinfer compares none of them.

    Source of the trap: SGLang PR #21649, where a kernel walked past its metadata.
    """
    if batch.num_requests and not _fits(batch, pages):
        _explain(batch, pages, place)
        raise AssertionError(f"{place}: a batch is refused for no reason that has a name")


def _fits(batch: LocalBatch, pages: PageGeometry) -> bool:
    """Whether every value is in order, in few array operations: it runs in each pass."""
    query_lens, seq_lens, table, size = (
        batch.query_lens, batch.seq_lens, batch.page_table, pages.page_size
    )  # fmt: skip
    (num_requests, width), num_rows = table.shape, batch.num_tokens
    if _least(query_lens) < 1 or _least(seq_lens - query_lens) < 0:
        return False
    if _most(seq_lens) > width * size or _most(table.view(np.uint32), None) >= pages.num_pages:
        return False
    unowned = np.arange(0, width * size, size, dtype=np.int32) >= seq_lens[:, None]
    if not _all(unowned | (table != NULL_PAGE), None):
        return False
    first = np.arange(0, num_requests * width, width)
    if num_rows == num_requests:  # decodes: a row's position is its sequence's last
        due = seq_lens - 1
    else:
        ahead = seq_lens - query_lens.cumsum()  # of a row's number is its position
        due, first = ahead.repeat(query_lens) + np.arange(num_rows), first.repeat(query_lens)
    if not _all(batch.positions == due):
        return False
    page = batch.positions // size
    pool_pages = table.ravel()[first + page].astype(np.int64)
    slots = pool_pages * size + (batch.positions - page * size)
    samples = batch.sample_rows.view(np.uint64)
    return bool(
        _all(batch.slot_mapping == slots) and (not len(samples) or _most(samples) < num_rows)
    )


def _explain(batch: LocalBatch, pages: PageGeometry, place: Place) -> None:
    """Raise ContractViolation for the first value that is not in order."""
    capacity = batch.page_table.shape[1] * pages.page_size
    _check(batch.query_lens.min() >= 1, place, "query_lens", batch.query_lens.min(), ">= 1")
    shortest = (batch.seq_lens - batch.query_lens).min()
    _check(shortest >= 0, place, "seq_lens - query_lens", shortest, ">= 0")
    _check(batch.seq_lens.max() <= capacity, place, "seq_lens", batch.seq_lens.max(), capacity)
    low, high = batch.page_table.min(), batch.page_table.max()
    _check(low >= 0, place, "page_table", low, ">= 0")
    _check(high < pages.num_pages, place, "page_table", high, f"< num_pages {pages.num_pages}")
    used = -(-batch.seq_lens // pages.page_size)
    owned = np.arange(batch.page_table.shape[1]) < used[:, None]
    _check(batch.page_table[owned].min() > 0, place, "page_table", 0, "pages in use are not null")
    _check_rows(batch, pages, place)
    if len(batch.sample_rows):
        first, last = batch.sample_rows.min(), batch.sample_rows.max()
        _check(first >= 0, place, "sample_rows", first, ">= 0")
        _check(last < batch.num_tokens, place, "sample_rows", last, f"< {batch.num_tokens}")


def _check_rows(batch: LocalBatch, pages: PageGeometry, place: Place) -> None:
    """Positions run up to seq_len - 1, and every row writes to the page of its position."""
    owner = np.repeat(np.arange(batch.num_requests), batch.query_lens)
    starts = np.cumsum(batch.query_lens) - batch.query_lens
    expected = (batch.seq_lens - batch.query_lens - starts)[owner] + np.arange(batch.num_tokens)
    wrong = np.flatnonzero(batch.positions != expected)
    if len(wrong):
        row = wrong[0]
        _check(False, place, f"positions[{row}]", batch.positions[row], expected[row])
    page = batch.page_table[owner, batch.positions // pages.page_size]
    slots = page.astype(np.int64) * pages.page_size + batch.positions % pages.page_size
    wrong = np.flatnonzero(batch.slot_mapping != slots)
    if len(wrong):
        row = wrong[0]
        _check(False, place, f"slot_mapping[{row}]", batch.slot_mapping[row], slots[row])


def _check(ok: bool | np.bool_, place: Place, field: str, value: object, allowed: object) -> None:
    if not ok:
        raise ContractViolation(f"{place}: {field} is {value}, allowed: {allowed}")

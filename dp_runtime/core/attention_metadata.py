"""AttentionMetadata: the inputs of an attention kernel, built from a LocalBatch alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_runtime.core.batch import NULL_PAGE, Int32, Int64, LocalBatch, slots_of
from dp_runtime.core.device_copy import all_on_device
from dp_runtime.errors import ContractViolation


@dataclass(frozen=True)
class PageGeometry:
    num_pages: int  # the null page 0 included
    page_size: int

    def __post_init__(self) -> None:
        assert self.num_pages * self.page_size <= 2**31, "a slot's number is an int32 on the device"


@dataclass(frozen=True)
class Place:
    dp_rank: int
    step_id: int
    pass_kind: str

    def __str__(self) -> str:
        return f"rank {self.dp_rank}, step {self.step_id}, pass {self.pass_kind}"


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """The sequences of one pass on one rank, on the device and in equal host mirrors."""

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

        num_rejected [n] int64, on the device: how much shorter than their bounds the first n
        requests, which have equally many rows, really are; the host mirrors keep the bounds.
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
    """Shorten the first n sequences by num_rejected [n], in place, and move their rows' slots."""
    count = len(num_rejected)
    lengths = seq_lens[:count]
    lengths -= num_rejected
    offsets = torch.arange(query_len, device=num_rejected.device)
    positions = (lengths[:, None] - query_len) + offsets
    pages = page_table[:count].gather(1, positions // page_size)
    slots[: count * query_len] = (pages * page_size + positions % page_size).flatten()


# An array's own min, max and all would add a layer of Python to these ufuncs.
_min, _max, _all = np.minimum.reduce, np.maximum.reduce, np.logical_and.reduce


@dataclass(eq=False)
class _Checked:
    """A batch, and the values that follow from its lengths and its page table."""

    batch: LocalBatch
    pages: PageGeometry

    @property
    def capacity(self) -> int:
        width: int = self.batch.page_table.shape[1]
        return width * self.pages.page_size

    @property
    def only_decodes(self) -> bool:
        return self.batch.num_tokens == self.batch.num_requests

    @property
    def unused(self) -> NDArray[np.bool_]:
        starts = np.arange(0, self.capacity, self.pages.page_size, dtype=np.int32)
        unused: NDArray[np.bool_] = starts >= self.batch.seq_lens[:, None]  # [requests, pages]
        return unused

    @property
    def _owner(self) -> Int64:  # [rows], request of each row
        requests = np.arange(self.batch.num_requests)
        return requests if self.only_decodes else requests.repeat(self.batch.query_lens)

    @property
    def positions(self) -> Int64:  # [rows], of each request up to its seq_len - 1
        batch = self.batch
        if self.only_decodes:
            return batch.seq_lens.astype(np.int64) - 1
        ahead = batch.seq_lens - batch.query_lens.cumsum()  # position of row r = r + ahead
        positions: Int64 = ahead.repeat(batch.query_lens) + np.arange(batch.num_tokens)
        return positions

    @property
    def slots(self) -> Int64:
        batch = self.batch
        return slots_of(batch.page_table, self._owner, batch.positions, self.pages.page_size)


class _Rule(NamedTuple):
    """A condition on a field; it may rely on the rules before it."""

    field: str
    holds: Callable[[_Checked], bool | np.bool_]
    found: Callable[[_Checked], object]  # the value that breaks the rule
    allowed: Callable[[_Checked], object]


def _out_of_range(values: NDArray[Any]) -> object:
    return values.min() if values.min() < 0 else values.max()


def _range(values: NDArray[Any], limit: str) -> str:
    return ">= 0" if values.min() < 0 else limit


RULES = (
    _Rule(
        "query_lens",
        lambda c: _min(c.batch.query_lens) >= 1,
        lambda c: c.batch.query_lens.min(),
        lambda c: ">= 1",
    ),
    _Rule(
        "seq_lens - query_lens",
        lambda c: _min(c.batch.seq_lens - c.batch.query_lens) >= 0,
        lambda c: (c.batch.seq_lens - c.batch.query_lens).min(),
        lambda c: ">= 0",
    ),
    _Rule(
        "seq_lens",
        lambda c: _max(c.batch.seq_lens) <= c.capacity,
        lambda c: c.batch.seq_lens.max(),
        lambda c: c.capacity,
    ),
    _Rule(
        "page_table",  # as unsigned numbers, negative ones are too large as well
        lambda c: _max(c.batch.page_table.view(np.uint32), None) < c.pages.num_pages,
        lambda c: _out_of_range(c.batch.page_table),
        lambda c: _range(c.batch.page_table, f"< num_pages {c.pages.num_pages}"),
    ),
    _Rule(
        "page_table",
        lambda c: _all(c.unused | (c.batch.page_table != NULL_PAGE), None),
        lambda c: NULL_PAGE,
        lambda c: "pages in use are not null",
    ),
    _Rule(
        "positions[{row}]",
        lambda c: _all(c.batch.positions == c.positions),
        lambda c: c.batch.positions,
        lambda c: c.positions,
    ),
    _Rule(
        "slot_mapping[{row}]",
        lambda c: _all(c.batch.slot_mapping == c.slots),
        lambda c: c.batch.slot_mapping,
        lambda c: c.slots,
    ),
    _Rule(
        "sample_rows",
        lambda c: (
            not len(c.batch.sample_rows)
            or _max(c.batch.sample_rows.view(np.uint64)) < c.batch.num_tokens
        ),
        lambda c: _out_of_range(c.batch.sample_rows),
        lambda c: _range(c.batch.sample_rows, f"< {c.batch.num_tokens}"),
    ),
)


def check_values(batch: LocalBatch, pages: PageGeometry, place: Place) -> None:
    """Raise ContractViolation for what leads a kernel out of the pool, as in SGLang PR #21649."""
    if not batch.num_requests:
        return
    checked = _Checked(batch, pages)
    for rule in RULES:
        if not rule.holds(checked):
            raise ContractViolation(f"{place}: {_explain(rule, checked)}")


def _explain(rule: _Rule, checked: _Checked) -> str:
    found, allowed = rule.found(checked), rule.allowed(checked)
    if isinstance(found, np.ndarray) and isinstance(allowed, np.ndarray):
        row = int(np.flatnonzero(found != allowed)[0])
        return f"{rule.field.format(row=row)} is {found[row]}, allowed: {allowed[row]}"
    return f"{rule.field} is {found}, allowed: {allowed}"

"""GraphInputs: what captured graphs read, written in place by one copy before each replay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.attention_metadata import AttentionMetadata, rewind_sequences
from dp_runtime.core.batch import Int32, LocalBatch
from dp_runtime.core.device_copy import aligned_offsets
from dp_runtime.core.recurrent_metadata import AcceptedDrafts
from dp_runtime.models.causal_lm import PassInputs
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.graphs.recurrent_inputs import RecurrentInputs

WORD = 4  # bytes of an int32
HOST_BUFFERS = 3  # a copy may still be under way when the next steps are written


@dataclass(eq=False)
class _HostBuffer:
    words: Tensor  # [words] int32, pinned
    fields: dict[str, Int32]  # views of words
    copied: torch.cuda.Event
    table_width: int = 0  # pages of the widest table so far; columns beyond it are null


class GraphInputs:
    """Holds the inputs of one kind of pass's graphs, for up to max_requests of query_len rows.

    All integers lie in one int32 tensor on the device, and in one pinned buffer on the host. The
    page table, by far the largest, is last, so that a copy can end with the requests in use.
    """

    def __init__(
        self,
        max_requests: int,
        query_len: int,
        table_pages: int,
        dp_size: int,
        hidden: Tensor,  # [max_requests * query_len, n], read by draft models; n is 0 for others
        page_size: int,
        *,
        keeps_state: bool = False,  # the model has recurrent layers
        accepted: AcceptedDrafts | None = None,  # of their slots, if drafts are verified
    ) -> None:
        rows, device = max_requests * query_len, hidden.device
        assert len(hidden) == rows, f"{len(hidden)} hidden states for {rows} rows"
        shapes: dict[str, tuple[int, ...]] = {
            "token_ids": (rows,),
            "future_token_index": (rows,),
            "positions": (rows,),
            "slot_mapping": (rows,),
            "seq_lens": (max_requests,),
            "row_ranges": (2, dp_size),
            **(RecurrentInputs.shapes(max_requests) if keeps_state else {}),
            "page_table": (max_requests, table_pages),
        }
        self.query_len = query_len
        self._page_size = page_size
        self.hidden = hidden
        *_, self._table_start, words = _offsets(shapes)
        self._words = torch.zeros(words, dtype=torch.int32, device=device)
        fields = _split(self._words, shapes)
        self.token_ids, self.future_token_index = fields["token_ids"], fields["future_token_index"]
        self.positions, self.slot_mapping = fields["positions"], fields["slot_mapping"]
        self.seq_lens, self.row_ranges = fields["seq_lens"], fields["row_ranges"]
        self.page_table = fields["page_table"]
        self.recurrent = RecurrentInputs(fields, accepted) if keeps_state else None
        self.cu_seqlens_q = query_len * torch.arange(
            max_requests + 1, dtype=torch.int32, device=device
        )
        self._future_tokens = torch.zeros(max(rows, 1), dtype=torch.int64, device=device)
        self._buffers = [_host_buffer(words, shapes) for _ in range(HOST_BUFFERS)]
        self._turn = 0

    def pass_inputs(self, rows: int) -> PassInputs:
        sources = self.future_token_index[:rows]
        future = self._future_tokens[sources.clamp(min=0)]
        token_ids = torch.where(sources >= 0, future, self.token_ids[:rows])
        positions, hidden = self.positions[:rows], self.hidden[:rows]
        return PassInputs(token_ids, positions, hidden)

    def owns(self, metadata: AttentionMetadata) -> bool:
        pairs = (
            (metadata.cu_seqlens_q, self.cu_seqlens_q),
            (metadata.seq_lens, self.seq_lens),
            (metadata.page_table, self.page_table),
            (metadata.slot_mapping, self.slot_mapping),
        )
        return all(one.data_ptr() == other.data_ptr() or not one.numel() for one, other in pairs)

    def write(
        self, batch: LocalBatch, local_rows: int, plan: PaddingPlan, future: FutureTokens
    ) -> None:
        """Bring a batch to the device, followed by null sequences up to local_rows."""
        buffer = self._next_buffer()
        (requests, pages), rows = batch.page_table.shape, batch.num_tokens
        into = buffer.fields
        for name in ("token_ids", "future_token_index", "slot_mapping"):
            into[name][:rows] = getattr(batch, name)
        rotary = batch.rotary_positions  # of text: time, height and width are one
        into["positions"][:rows] = rotary if rotary.ndim == 1 else rotary[0]
        into["seq_lens"][:requests] = batch.seq_lens
        buffer.table_width = max(buffer.table_width, pages)
        into["page_table"][:requests, :pages] = batch.page_table
        into["page_table"][:requests, pages : buffer.table_width] = 0
        if self.recurrent is not None:
            self.recurrent.write(into, batch)
        self._write_null_rows(buffer, requests, local_rows // self.query_len)
        into["row_ranges"][:] = plan.row_ranges
        self._copy(buffer, local_rows)
        count = min(len(future.token_ids), len(self._future_tokens))
        self._future_tokens[:count].copy_(future.token_ids[:count])
        if future.num_rejected is not None:
            self._rewind(future.num_rejected)
        if self.hidden.shape[1]:
            self.hidden[:rows].copy_(future.hidden)

    def _rewind(self, num_rejected: Tensor) -> None:
        """Move the first sequences from a batch's upper bounds to their true lengths."""
        count, length = len(num_rejected), self.query_len
        self.positions[: count * length].view(count, length).sub_(num_rejected[:, None])
        own = self.seq_lens, self.slot_mapping, self.page_table, self._page_size
        rewind_sequences(num_rejected, length, *own)

    def write_null(self, local_rows: int, plan: PaddingPlan) -> None:
        buffer = self._next_buffer()
        self._write_null_rows(buffer, 0, local_rows // self.query_len)
        buffer.fields["row_ranges"][:] = plan.row_ranges
        self._copy(buffer, local_rows)

    def _write_null_rows(self, buffer: _HostBuffer, start: int, stop: int) -> None:
        into, length = buffer.fields, self.query_len
        rows = slice(start * length, stop * length)
        into["token_ids"][rows] = 0
        into["future_token_index"][rows] = -1
        for name in ("positions", "slot_mapping"):
            into[name][rows].reshape(-1, length)[:] = np.arange(length)
        into["seq_lens"][start:stop] = length
        into["page_table"][start:stop, : buffer.table_width] = 0
        if self.recurrent is not None:
            self.recurrent.write_null(into, start, stop)

    def _next_buffer(self) -> _HostBuffer:
        self._turn = (self._turn + 1) % HOST_BUFFERS
        buffer = self._buffers[self._turn]
        buffer.copied.synchronize()
        return buffer

    def _copy(self, buffer: _HostBuffer, local_rows: int) -> None:
        requests = local_rows // self.query_len
        words = self._table_start + requests * self.page_table.shape[1]
        self._words[:words].copy_(buffer.words[:words], non_blocking=True)
        buffer.copied.record()


def _host_buffer(words: int, shapes: dict[str, tuple[int, ...]]) -> _HostBuffer:
    pinned = torch.zeros(words, dtype=torch.int32, pin_memory=True)
    fields = {name: part.numpy() for name, part in _split(pinned, shapes).items()}
    return _HostBuffer(pinned, fields, torch.cuda.Event())  # type: ignore[no-untyped-call]


def _offsets(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return each field's first word, and last the number of words."""
    sizes = [math.prod(shape) * WORD for shape in shapes.values()]
    return tuple(offset // WORD for offset in aligned_offsets(sizes))


def _split(words: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        name: words[start : start + math.prod(shape)].view(shape)
        for start, (name, shape) in zip(_offsets(shapes), shapes.items())
    }

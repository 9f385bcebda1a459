"""The checks between a plan and its kernels, which crash or return garbage instead of checking.

Values are checked on the host when a metadata is built. Here shapes, dtypes and devices are
compared, per pass and per layer; only `check_device_values` reads device tensors back and waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.core.attention_metadata import AttentionMetadata
from dp_runtime.core.batch import Int32, Int64, slots_of
from dp_runtime.errors import ContractViolation

Comparison = tuple[str, object, object]  # what, as found, as due
TENSOR = ("shape", "dtype", "device", "contiguity")


def compare(comparisons: Iterable[Comparison], where: str) -> None:
    """Raise ContractViolation for the first comparison that does not hold."""
    for what, found, due in comparisons:
        if found != due:
            raise ContractViolation(
                f"{where}: {what} is {_text(found)}, the metadata and the pool say {_text(due)}"
            )


def _text(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def metadata_comparisons(
    metadata: AttentionMetadata, spec: AttentionSpec, device: torch.device
) -> Iterable[Comparison]:
    """Compare every device tensor of a metadata with its host mirrors."""
    query_lens, seq_lens = metadata.query_lens_host, metadata.seq_lens_host
    table = metadata.page_table_host
    requests, rows = len(query_lens), int(query_lens.sum())
    yield "seq_lens_host rows", len(seq_lens), requests
    yield "page_table_host rows", len(table), requests
    shapes = {
        "cu_seqlens_q": ((requests + 1,), torch.int32),
        "seq_lens": ((requests,), torch.int32),
        "page_table": (table.shape, torch.int32),
        "slot_mapping": ((rows,), torch.int32),
    }
    for name, (shape, dtype) in shapes.items():
        yield from tensor_comparisons(name, getattr(metadata, name), shape, dtype, device)
    if spec.check_device_values:
        yield from value_comparisons("cu_seqlens_q", metadata.cu_seqlens_q, offsets(query_lens))
        yield from value_comparisons("seq_lens", metadata.seq_lens, seq_lens)
        yield from value_comparisons("page_table", metadata.page_table, table)
        slots = slots_due(metadata, spec.page_size)
        yield from value_comparisons("slot_mapping", metadata.slot_mapping, slots)


def tensor_comparisons(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterable[Comparison]:
    found = (tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous())
    due = (shape, dtype, device, True)
    if found != due:
        yield from zip((f"{name} {what}" for what in TENSOR), found, due)


def value_comparisons(name: str, tensor: Tensor, due: NDArray[Any]) -> Iterable[Comparison]:
    """Find the first value that differs from its host mirror; waits for the device."""
    found = tensor.cpu().numpy()
    wrong = np.argwhere(found != due)
    if len(wrong):
        at = tuple(int(index) for index in wrong[0])
        yield f"{name}[{', '.join(map(str, at))}] on the device", int(found[at]), int(due[at])


def offsets(lengths: Int32) -> Int32:
    """Sum up [n] lengths to [n + 1] int32: where each begins, and where the last ends."""
    result = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=result[1:])
    return result


def slots_due(metadata: AttentionMetadata, page_size: int) -> Int64:
    """Compute the cache slot of every row from lengths and page table alone."""
    query_lens, seq_lens = metadata.query_lens_host, metadata.seq_lens_host
    owner = np.repeat(np.arange(len(query_lens)), query_lens)
    first = seq_lens - query_lens - offsets(query_lens)[:-1]
    positions = first[owner] + np.arange(len(owner))
    return slots_of(metadata.page_table_host, owner, positions, page_size)

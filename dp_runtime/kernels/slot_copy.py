"""Copies of whole slots of recurrent states, of all layers in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 4  # bytes
WORDS_AT_ONCE = 4096  # of a slot, in a program


def slot_table(tensors: list[Tensor]) -> tuple[Tensor, int]:
    """List where each tensor lies and the words of a slot: [tensors, 2] int64, and the most words.

    tensors: [slots, ...] of one device, which stay where they are.
    """
    assert all(tensor.is_contiguous() for tensor in tensors), "a slot is in one piece"
    sizes = [tensor[0].numel() * tensor.element_size() for tensor in tensors]
    assert all(size % WORD == 0 for size in sizes), f"slots of {sizes} bytes are whole words"
    rows = [(tensor.data_ptr(), size // WORD) for tensor, size in zip(tensors, sizes)]
    table = torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)
    return table, max(sizes) // WORD


def copy_slots(table: Tensor, max_words: int, pairs: Tensor) -> None:
    """Copy slots; pairs [copies, 2] int64: from, to. None is written twice, or read and written."""
    grid = (triton.cdiv(max_words, WORDS_AT_ONCE), len(table), len(pairs))
    _copy_kernel[grid](table, pairs, BLOCK=WORDS_AT_ONCE, num_warps=8)


@triton.jit
def _copy_kernel(table, pairs, BLOCK: tl.constexpr):
    tensor, pair = table + 2 * tl.program_id(1), pairs + 2 * tl.program_id(2)
    base, words = tl.load(tensor), tl.load(tensor + 1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < words
    memory = base.to(tl.pointer_type(tl.int32))
    values = tl.load(memory + tl.load(pair) * words + at, mask=inside)
    tl.store(memory + tl.load(pair + 1) * words + at, values, mask=inside)

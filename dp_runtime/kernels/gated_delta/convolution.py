"""Causal convolution and SiLU of q, k and v, and the gates of the delta rule, in one launch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.core.recurrent_metadata import CHUNK, RecurrentMetadata
from dp_runtime.kernels.gated_delta.rows import DeltaRows
from dp_runtime.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    overlaps,
)

CHANNELS_AT_ONCE = 512  # with 16 bytes of each load to a thread
CHUNK_ROWS, DRAFT_ROWS = 4, 2  # that a program takes at once: of a prompt, of a verification
GATE_ROWS = tl.constexpr(8)


def convolve(
    qkv: Tensor,  # [rows, channels]
    ba: Tensor,  # [rows, 2 * num_v_heads], b before a
    weight: Tensor,  # [width, channels]
    decay: Tensor,  # [num_v_heads] float32, -exp(A_log)
    dt_bias: Tensor,  # [num_v_heads] float32
    windows: Tensor,  # [slots, width - 1 + max_drafts, channels], written
    draft_gates: Tensor | None,  # [slots, max_drafts, 2, num_v_heads] float32, written
    sequences: RecurrentMetadata,
) -> DeltaRows:
    """Convolve each channel with itself in time and keep the last inputs for the next pass.

    A window holds the width - 1 inputs before this pass's drafts, and those of the drafts. Sums
    and SiLU are float32 and rounded once to qkv's dtype.
    """
    (rows, channels), heads, device = qkv.shape, decay.shape[0], qkv.device
    width = weight.shape[0]
    max_drafts = windows.shape[1] - (width - 1)
    assert qkv.stride(1) == ba.stride(1) == 1, "a row is in one piece"
    assert windows.dtype == qkv.dtype, "windows keep the rows as they came"
    assert weight.is_contiguous(), "weights are contiguous"
    assert windows.is_contiguous(), "windows are contiguous"
    assert draft_gates is None or draft_gates.is_contiguous(), "gates of drafts are contiguous"
    drafts, tracks, tables = sequences.drafts, sequences.tracks, sequences.row_blocks
    has_room = (draft_gates is not None) == (max_drafts > 0) == (drafts is not None)
    assert has_room, "a slot has room for drafts if there may be some, and only then"
    total = rows + sequences.batch_size * max_drafts
    out = torch.empty(total, channels, dtype=qkv.dtype, device=device)
    gates = torch.empty(total, 2, heads, dtype=torch.float32, device=device)
    at_once = CHUNK_ROWS if tables.num_chunks else DRAFT_ROWS if max_drafts else 1
    num_blocks, pdl = tables.blocks.shape[0], overlaps(device)
    if num_blocks:
        arguments = (
            qkv, ba, weight, decay, dt_bias, windows, draft_gates, out, gates,
            tables.blocks, sequences.cu_seqlens, sequences.slots, sequences.is_fresh,
            drafts and drafts.num_drafts, drafts and drafts.num_accepted,
            tracks and tracks.slots, tracks and tracks.rows,
            qkv.stride(0), ba.stride(0), rows,
        )  # fmt: skip
        constants = _constants(channels, width, max_drafts, heads, at_once, pdl)
        grid = (-(-channels // CHANNELS_AT_ONCE) + 1, num_blocks, 1)
        launch(_convolve_kernel, grid, arguments, constants, num_warps=2, launch_pdl=pdl)
    return DeltaRows(out, gates, rows, max_drafts)


@cache
def _constants(
    channels: int, width: int, max_drafts: int, heads: int, rows: int, pdl: bool
) -> Mapping[str, int]:
    return {
        "CHANNELS": channels, "WIDTH": width, "MAX_DRAFTS": max_drafts, "HEADS": heads,
        "BLOCK": CHUNK, "ROWS": rows, "BLOCK_CHANNELS": CHANNELS_AT_ONCE,
        "BLOCK_HEADS": _power(heads), "BLOCK_COLUMNS": _power(width - 1 + max_drafts),
        "BLOCK_DRAFTS": _power(max(max_drafts, 1)), "PDL": pdl,
    }  # fmt: skip


def _power(size: int) -> int:
    power: int = triton.next_power_of_2(size)
    return power


@triton.jit(do_not_specialize=["rows"])
def _convolve_kernel(
    qkv, ba, weight, decay, dt_bias, windows, draft_gates, out, gates,
    blocks, cu_seqlens, slots, is_fresh, num_drafts, num_accepted, track_slots, track_rows,
    qkv_stride, ba_stride, rows,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, MAX_DRAFTS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DRAFTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The program of a sequence's first block alone touches its slot, and runs accepted drafts."""
    request = tl.load(blocks + 2 * tl.program_id(1)).to(tl.int64)
    first = tl.load(blocks + 2 * tl.program_id(1) + 1) * BLOCK
    start = tl.load(cu_seqlens + request)
    length = tl.load(cu_seqlens + request + 1) - start
    slot = tl.load(slots + request).to(tl.int64)
    has_past = (slot != 0) & (tl.load(is_fresh + request) == 0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    drafts, accepted = 0, 0
    if MAX_DRAFTS:
        drafts = tl.load(num_drafts + request).to(tl.int32)
        accepted = tl.where(has_past, tl.load(num_accepted + request), 0).to(tl.int32)
    end = tl.minimum(first + BLOCK, length)
    replay = rows + request * MAX_DRAFTS
    if tl.program_id(0) * BLOCK_CHANNELS < CHANNELS:
        _convolve_block(
            qkv, weight, windows, out, start, length, slot, has_past, drafts, accepted,
            first, end, replay, qkv_stride,
            CHANNELS, WIDTH, MAX_DRAFTS, ROWS, BLOCK_CHANNELS, BLOCK_COLUMNS,
        )  # fmt: skip
        if track_slots is not None:
            track_slot = tl.load(track_slots + request).to(tl.int64)
            tracked = tl.load(track_rows + request)
            if first == 0:
                _track_block(
                    qkv, windows, start, track_slot, tracked, qkv_stride,
                    CHANNELS, WIDTH, MAX_DRAFTS, BLOCK_CHANNELS, BLOCK_COLUMNS,
                )  # fmt: skip
    else:
        replayed = tl.arange(0, BLOCK_DRAFTS)[:, None]
        _gate_block(
            ba, decay, dt_bias, draft_gates, gates, start, length, slot, drafts, accepted,
            first, end, replayed, replay + replayed, ba_stride,
            MAX_DRAFTS, HEADS, GATE_ROWS, BLOCK_HEADS,
        )  # fmt: skip


@triton.jit
def _convolve_block(
    qkv, weight, windows, out, start, length, slot, has_past, drafts, accepted,
    first, end, replay, stride,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, MAX_DRAFTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    inside = channel < CHANNELS
    new = qkv + start.to(tl.int64) * stride + channel
    window = windows + slot * (WIDTH - 1 + MAX_DRAFTS) * CHANNELS + channel
    seen = tl.where(has_past, WIDTH - 1 + accepted, 0)  # inputs in the window
    for some in range(tl.where(first == 0, -accepted, first), end, ROWS):
        row = some + tl.arange(0, ROWS)[:, None]
        y = tl.zeros([ROWS, BLOCK_CHANNELS], tl.float32)
        for tap in tl.static_range(WIDTH):
            gain = tl.load(weight + tap * CHANNELS + channel, mask=inside, other=0.0)
            index = row - (WIDTH - 1) + tap
            x = _inputs(new, window, index, length, seen, inside, stride, CHANNELS)
            y += x.to(tl.float32) * gain.to(tl.float32)
        y /= 1.0 + tl.exp(-y)
        target = tl.where(row < 0, replay + accepted + row, (start + row).to(tl.int64))
        into = out + target * CHANNELS + channel
        tl.store(into, y.to(out.dtype.element_ty), mask=(row < end) & inside)
    if first == 0:
        column = tl.arange(0, BLOCK_COLUMNS)[:, None]
        index = length - drafts - (WIDTH - 1) + column
        kept = _inputs(new, window, index, length, seen, inside, stride, CHANNELS)
        tl.debug_barrier()  # all threads have read the window
        is_kept = (column < tl.where(slot != 0, WIDTH - 1 + drafts, 0)) & inside
        tl.store(window + column * CHANNELS, kept, mask=is_kept)


@triton.jit
def _track_block(
    qkv, windows, start, slot, tracked, stride,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, MAX_DRAFTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Leave the inputs before row `tracked`, which are all of this pass, in another slot."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    column = tl.arange(0, BLOCK_COLUMNS)[:, None]
    is_kept = (column < tl.where(slot != 0, WIDTH - 1, 0)) & (channel < CHANNELS)
    row = (start + tracked - (WIDTH - 1) + column).to(tl.int64)
    kept = tl.load(qkv + row * stride + channel, mask=is_kept, other=0.0)
    window = windows + (slot * (WIDTH - 1 + MAX_DRAFTS) + column) * CHANNELS + channel
    tl.store(window, kept, mask=is_kept)


@triton.jit
def _gate_block(
    ba, decay, dt_bias, draft_gates, gates, start, length, slot, drafts, accepted,
    first, end, replayed, replay, stride,
    MAX_DRAFTS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, BLOCK_HEADS)[None, :]
    inside = head < HEADS
    for some in range(first, end, ROWS):
        row = some + tl.arange(0, ROWS)[:, None]
        g, beta = _gates(ba, decay, dt_bias, start, row, length, head, stride, HEADS)
        into = gates + (start + row).to(tl.int64) * 2 * HEADS + head
        tl.store(into, g, mask=(row < end) & inside)
        tl.store(into + HEADS, beta, mask=(row < end) & inside)
    if MAX_DRAFTS:
        accepted, drafts = tl.where(first == 0, accepted, 0), tl.where(first == 0, drafts, 0)
        own = draft_gates + (slot * MAX_DRAFTS + replayed) * 2 * HEADS + head
        is_replayed = inside & (replayed < accepted)
        old_g = tl.load(own, mask=is_replayed, other=0.0)
        old_beta = tl.load(own + HEADS, mask=is_replayed, other=0.0)
        at = gates + replay * 2 * HEADS + head
        tl.store(at, old_g, mask=is_replayed)
        tl.store(at + HEADS, old_beta, mask=is_replayed)
        draft = length - drafts + replayed
        new_g, new_beta = _gates(ba, decay, dt_bias, start, draft, length, head, stride, HEADS)
        tl.debug_barrier()  # all threads have read the old gates
        is_kept = inside & (replayed < tl.where(slot != 0, drafts, 0))
        tl.store(own, new_g, mask=is_kept)
        tl.store(own + HEADS, new_beta, mask=is_kept)


@triton.jit
def _inputs(new, window, index, length, seen, inside, stride, CHANNELS: tl.constexpr):
    """Load inputs of a sequence by their index [n, 1]; negative ones came before this pass."""
    is_known = (index < length) & (seen + index >= 0)
    before = window + (seen + index) * CHANNELS
    at = tl.where(index < 0, before, new + index.to(tl.int64) * stride)
    return tl.load(at, mask=is_known & inside, other=0.0)


@triton.jit
def _gates(ba, decay, dt_bias, start, row, length, head, stride, HEADS: tl.constexpr):
    inside = (row >= 0) & (row < length) & (head < HEADS)
    at = ba + (start + row).to(tl.int64) * stride + head
    b = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(at + HEADS, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(dt_bias + head, mask=head < HEADS, other=0.0)
    size = tl.exp(-tl.abs(x))
    # Of 1 + size a float32 keeps too little of a small size: its logarithm by the series.
    series = size * (1 - size * (0.5 - size * (0.33333333 - size * (0.25 - size * 0.2))))
    softplus = tl.maximum(x, 0.0) + tl.where(size < 0.03125, series, tl.log(1.0 + size))
    g = tl.load(decay + head, mask=head < HEADS, other=0.0) * softplus
    return g, 1.0 / (1.0 + tl.exp(-b))

"""Causal convolution and SiLU of q, k and v, and the gates of the delta rule, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.core.recurrent_metadata import CHUNK, RecurrentMetadata
from dp_runtime.kernels.gated_delta.rows import DeltaRows
from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait, overlaps

CHANNELS_AT_ONCE, ROWS_AT_ONCE = 128, 8


def convolve(
    qkv: Tensor,  # [rows, channels]
    ba: Tensor,  # [rows, 2 * num_v_heads], b before a
    weight: Tensor,  # [channels, 1, width]
    decay: Tensor,  # [num_v_heads] float32, -exp(A_log)
    dt_bias: Tensor,  # [num_v_heads] float32
    windows: Tensor,  # [slots, channels, width - 1 + max_drafts], written
    draft_gates: Tensor | None,  # [slots, max_drafts, 2, num_v_heads] float32, written
    sequences: RecurrentMetadata,
) -> DeltaRows:
    """Convolve each channel with itself in time and keep the last inputs for the next pass.

    A window holds the width - 1 inputs before this pass's drafts, and those of the drafts. Sums
    and SiLU are float32 and rounded once to qkv's dtype.
    """
    (rows, channels), heads, device = qkv.shape, len(decay), qkv.device
    width, columns = weight.shape[-1], windows.shape[2]
    max_drafts = columns - (width - 1)
    assert qkv.stride(1) == ba.stride(1) == 1, "a row is in one piece"
    together = [x for x in (weight, windows, draft_gates) if x is not None]
    assert all(x.is_contiguous() for x in together), "weights, windows and gates are contiguous"
    drafts, tracks = sequences.drafts, sequences.tracks
    blocks = sequences.row_blocks.blocks
    has_room = (draft_gates is not None) == (max_drafts > 0) == (drafts is not None)
    assert has_room, "a slot has room for drafts if there may be some, and only then"
    total = rows + sequences.batch_size * max_drafts
    out = torch.empty(total, channels, dtype=qkv.dtype, device=device)
    gates = torch.empty(total, 2, heads, dtype=torch.float32, device=device)
    channel_blocks, pdl = triton.cdiv(channels, CHANNELS_AT_ONCE), overlaps(device)
    if len(blocks):
        _convolve_kernel[(channel_blocks + 1, len(blocks))](
            qkv, ba, weight, decay, dt_bias, windows, draft_gates, out, gates,
            blocks, sequences.cu_seqlens, sequences.slots, sequences.is_fresh,
            drafts and drafts.num_drafts, drafts and drafts.num_accepted,
            tracks and tracks.slots, tracks and tracks.rows,
            qkv.stride(0), ba.stride(0), rows,
            CHANNELS=channels, WIDTH=width, MAX_DRAFTS=max_drafts, HEADS=heads,
            BLOCK=CHUNK, ROWS=ROWS_AT_ONCE, BLOCK_CHANNELS=CHANNELS_AT_ONCE,
            BLOCK_HEADS=triton.next_power_of_2(heads),
            BLOCK_COLUMNS=triton.next_power_of_2(columns),
            BLOCK_DRAFTS=triton.next_power_of_2(max(max_drafts, 1)),
            PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return DeltaRows(out, gates, rows, max_drafts)


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
    """The program of a sequence's first block alone touches its slot: reads it, then writes it."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    request = tl.load(blocks + 2 * tl.program_id(1)).to(tl.int64)
    first = tl.load(blocks + 2 * tl.program_id(1) + 1) * BLOCK
    start = tl.load(cu_seqlens + request)
    length = tl.load(cu_seqlens + request + 1) - start
    slot = tl.load(slots + request).to(tl.int64)
    has_past = (slot != 0) & (tl.load(is_fresh + request) == 0)
    drafts, accepted = 0, 0
    if MAX_DRAFTS:
        drafts = tl.load(num_drafts + request).to(tl.int32)
        accepted = tl.where(has_past, tl.load(num_accepted + request), 0).to(tl.int32)
    end = tl.minimum(first + BLOCK, length)
    replayed = tl.arange(0, BLOCK_DRAFTS)[:, None]
    replay = rows + request * MAX_DRAFTS + replayed
    if tl.program_id(0) * BLOCK_CHANNELS < CHANNELS:
        _convolve_block(
            qkv, weight, windows, out, start, length, slot, has_past, drafts, accepted,
            first, end, replayed, replay, qkv_stride,
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
        _gate_block(
            ba, decay, dt_bias, draft_gates, gates, start, length, slot, drafts, accepted,
            first, end, replayed, replay, ba_stride, MAX_DRAFTS, HEADS, ROWS, BLOCK_HEADS,
        )  # fmt: skip


@triton.jit
def _convolve_block(
    qkv, weight, windows, out, start, length, slot, has_past, drafts, accepted,
    first, end, replayed, replay, stride,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, MAX_DRAFTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype = out.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    inside = channel < CHANNELS
    new = qkv + start.to(tl.int64) * stride + channel
    window = windows + (slot * CHANNELS + channel) * (WIDTH - 1 + MAX_DRAFTS)
    taps = weight + channel * WIDTH
    seen = tl.where(has_past, WIDTH - 1 + accepted, 0)  # inputs in the window
    for some in range(first, end, ROWS):
        row = some + tl.arange(0, ROWS)[:, None]
        y = _taps(new, window, taps, row, length, seen, inside, stride, WIDTH)
        into = out + (start + row).to(tl.int64) * CHANNELS + channel
        tl.store(into, y.to(dtype), mask=(row < end) & inside)
    if first == 0:
        if MAX_DRAFTS:
            before = replayed - accepted
            again = _taps(new, window, taps, before, length, seen, inside, stride, WIDTH)
            at = out + replay * CHANNELS + channel
            tl.store(at, again.to(dtype), mask=(before < 0) & inside)
        column = tl.arange(0, BLOCK_COLUMNS)[:, None]
        index = length - drafts - (WIDTH - 1) + column
        kept = _inputs(new, window, index, length, seen, inside, stride)
        tl.debug_barrier()  # all threads have read the window
        is_kept = (column < tl.where(slot != 0, WIDTH - 1 + drafts, 0)) & inside
        tl.store(window + column, kept, mask=is_kept)


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
    window = windows + (slot * CHANNELS + channel) * (WIDTH - 1 + MAX_DRAFTS)
    tl.store(window + column, kept, mask=is_kept)


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
def _inputs(new, window, index, length, seen, inside, stride):
    """Load inputs of a sequence by their index [n, 1]; negative ones came before this pass."""
    is_new = (index >= 0) & (index < length) & inside
    is_old = (index < 0) & (seen + index >= 0) & inside
    x = tl.load(new + index.to(tl.int64) * stride, mask=is_new, other=0.0)
    return tl.where(index < 0, tl.load(window + seen + index, mask=is_old, other=0.0), x)


@triton.jit
def _taps(new, window, taps, row, length, seen, inside, stride, WIDTH: tl.constexpr):
    total = row * 0.0
    for tap in tl.static_range(WIDTH):
        weight = tl.load(taps + tap, mask=inside, other=0.0).to(tl.float32)
        index = row - (WIDTH - 1) + tap
        total += _inputs(new, window, index, length, seen, inside, stride).to(tl.float32) * weight
    return total / (1.0 + tl.exp(-total))


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

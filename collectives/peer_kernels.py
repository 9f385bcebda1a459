"""Triton kernels that move rows between GPUs by writing into the peers' memory.

Rows are read by a layout on the device, [2, SIZE] int32: where each rank's rows begin among all
ranks' rows, and how many of them are real. Only real rows cross the wire, whatever the shapes are.

A row is cut into tiles of COLS columns, and tile t of every rank's rows belongs to program t modulo
the number of programs, which is the same on all ranks. So program b of a rank writes its share into
every peer, then raises flag (b, rank) there, waits for the flags that the peers' programs b raise
here, and may then read what they wrote. A flag holds the number of the call, which the device
counts by itself: a captured graph can be replayed. A wait ends early once the host sets `stop`;
what it waited for is not there then.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dp_runtime.layers.triton_launch import gdc_launch_dependents, gdc_wait

MAX_PROGRAMS = 512  # four on each multiprocessor


@triton.jit
def _flags(
    flags, own_flags, calls, rank, SIZE: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """This program's flags: the number of the call, where to raise it, where to wait, for whom."""
    block = tl.program_id(0)
    peer = tl.arange(0, RANKS)
    others = (peer < SIZE) & (peer != rank)
    there = tl.load(flags + peer, mask=others, other=0).to(tl.pointer_type(tl.int32))
    here = own_flags + block * SIZE + peer
    return tl.load(calls + block) + 1, there + block * SIZE + rank, here, others


@triton.jit
def _raise_and_wait(
    call, there, here, others, calls, stop, RANKS: tl.constexpr, POLLS_PER_LOOK: tl.constexpr = 64
):  # fmt: skip
    tl.debug_barrier()  # every thread's rows are written before the flags are
    raised = tl.zeros((RANKS,), tl.int32) + call
    tl.atomic_xchg(there, raised, mask=others, sem="release", scope="sys")
    missing, polls = 1, 0
    while missing > 0:
        seen = tl.load(here, mask=others, other=0, volatile=True)
        # NOTE: the difference is right where the count wraps around
        missing = tl.sum((others & (seen - call < 0)).to(tl.int32), 0)
        polls += 1
        if polls % POLLS_PER_LOOK == 0:  # noqa: SIM102 (`and` would load in every poll)
            if tl.load(stop, volatile=True) != 0:
                missing = 0
    tl.atomic_add(here, tl.zeros((RANKS,), tl.int32), mask=others, sem="acquire", scope="sys")
    tl.debug_barrier()
    tl.store(calls + tl.program_id(0), call)


@triton.jit(do_not_specialize=["slot_rows", "rank"])
def gather_kernel(
    own, layout, slot_rows, row_words, buffers, flags, own_flags, calls, stop, rank,
    SIZE: tl.constexpr, RANKS: tl.constexpr, COLS: tl.constexpr, POISON: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Own real rows, as integer words, go to their place in every rank's gathered rows.

    POISON: the rest of each rank's slot_rows becomes NaN here: all bits set, in every float type.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    call, there, here, others = _flags(flags, own_flags, calls, rank, SIZE, RANKS)
    pointer: tl.constexpr = tl.pointer_type(own.dtype.element_ty)
    width = tl.cdiv(row_words, COLS)
    first = tl.load(layout + rank).to(tl.int64)
    tiles = tl.load(layout + SIZE + rank) * width
    tile = tl.program_id(0)
    while tile < tiles:
        row = (tile // width).to(tl.int64)
        col = tile % width * COLS + tl.arange(0, COLS)
        value = tl.load(own + row * row_words + col, mask=col < row_words)
        at = (first + row) * row_words + col
        for i in tl.static_range(1, SIZE + 1):  # the own copy last: it has the shortest way
            into = tl.multiple_of(tl.load(buffers + (rank + i) % SIZE).to(pointer), 16)
            tl.store(into + at, value, mask=col < row_words)
        tile += tl.num_programs(0)
    if POISON:
        mine = tl.multiple_of(tl.load(buffers + rank).to(pointer), 16)
        nan = tl.full((COLS,), -1, own.dtype.element_ty)
        for source in tl.static_range(SIZE):
            first = tl.load(layout + source).to(tl.int64)
            tile = tl.load(layout + SIZE + source) * width + tl.program_id(0)
            while tile < slot_rows * width:
                row = (tile // width).to(tl.int64)
                col = tile % width * COLS + tl.arange(0, COLS)
                tl.store(mine + (first + row) * row_words + col, nan, mask=col < row_words)
                tile += tl.num_programs(0)
    _raise_and_wait(call, there, here, others, calls, stop, RANKS)


@triton.jit(do_not_specialize=["own_rows", "slot_rows", "rank"])
def reduce_scatter_kernel(
    partial, out, layout, own_rows, slot_rows, row_size, buffers, flags, own_flags, calls, stop,
    rank, SIZE: tl.constexpr, RANKS: tl.constexpr, COLS: tl.constexpr, SUM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Each rank's real rows go to slot `rank` of its buffer; the own slots are summed in order.

    A slot has slot_rows rows; own_rows of the sum are written, 0 beyond the real ones.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    call, there, here, others = _flags(flags, own_flags, calls, rank, SIZE, RANKS)
    pointer: tl.constexpr = tl.pointer_type(partial.dtype.element_ty)
    real = tl.load(layout + SIZE + rank)
    mine = tl.multiple_of(tl.load(buffers + rank).to(pointer), 16)
    width = tl.cdiv(row_size, COLS)
    slot_size = tl.cast(slot_rows, tl.int64) * row_size
    for i in tl.static_range(1, SIZE + 1):
        to = (rank + i) % SIZE
        first = tl.load(layout + to).to(tl.int64)
        tiles = tl.load(layout + SIZE + to) * width
        slot = tl.multiple_of(tl.load(buffers + to).to(pointer), 16) + rank * slot_size
        tile = tl.program_id(0)
        while tile < tiles:
            row = (tile // width).to(tl.int64)
            col = tile % width * COLS + tl.arange(0, COLS)
            value = tl.load(partial + (first + row) * row_size + col, mask=col < row_size)
            tl.store(slot + row * row_size + col, value, mask=col < row_size)
            tile += tl.num_programs(0)
    _raise_and_wait(call, there, here, others, calls, stop, RANKS)
    tile = tl.program_id(0)
    while tile < own_rows * width:
        row = (tile // width).to(tl.int64)
        col = tile % width * COLS + tl.arange(0, COLS)
        columns = tl.where(row < real, row_size, 0)
        total = tl.zeros((COLS,), SUM)
        for source in tl.static_range(SIZE):
            at = mine + source * slot_size + row * row_size + col
            total += tl.load(at, mask=col < columns, other=0, volatile=True).to(SUM)
        tl.store(out + row * row_size + col, total.to(out.dtype.element_ty), mask=col < row_size)
        tile += tl.num_programs(0)

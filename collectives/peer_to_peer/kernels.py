"""Triton kernels that move rows between GPUs through peers' memory; docs/collectives.md says how.

NOTE: layout and counts are read before gdc_wait. They are complete: a kernel lets its successor
start once its own gdc_wait has returned, so all kernels but the last have ended, and gathers and
reduce-scatters, whose counts are apart, alternate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait

MAX_PROGRAMS = 512
LINE: tl.constexpr = tl.constexpr(32)  # flags of a program, of which each rank has one: 128 bytes


@triton.jit
def _places(
    table, layout, rank, SIZE: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Return each rank's (buffer, first row, real rows), the next rank first, the own one last."""
    places = ()
    for i in tl.static_range(1, SIZE + 1):
        to = (rank + i) % SIZE
        buffer = tl.multiple_of(tl.load(table + to).to(tl.pointer_type(dtype)), 16)
        first = tl.load(layout + to, volatile=True).to(tl.int64)
        real = tl.load(layout + SIZE + to, volatile=True)
        place = (buffer, first, real)
        places = places + (place,)  # type: ignore[assignment]  # noqa: RUF005
    return places


@triton.jit
def _takes_part(ranks, tiles):
    """Select the ranks with whom this program shares tiles; program 0 meets all."""
    return tl.where(tl.program_id(0) < tl.maximum(tiles, 1), ranks, False)


@triton.jit
def _flags(
    flags, own_flags, heard, rank, SIZE: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """Return the peers, this program's flags there and here, its count of theirs, and the next."""
    peer = tl.arange(0, RANKS)
    others = (peer < SIZE) & (peer != rank)
    line = tl.program_id(0) * LINE
    there = tl.load(flags + peer, mask=others, other=0).to(tl.pointer_type(tl.int32)) + line + rank
    count = heard + line + peer
    awaited = tl.load(count, mask=others, other=0, volatile=True) + 1
    return others, there, own_flags + line + peer, count, awaited


@triton.jit
def _raise_and_wait(
    there, here, count, awaited, sent, coming, stop, RANKS: tl.constexpr,
    POLLS_PER_LOOK: tl.constexpr = 64,
):  # fmt: skip
    """Raise the flags of the peers that rows were sent to, and wait for those that send some."""
    tl.debug_barrier()  # every thread's rows are written before the flags are
    one = tl.full((RANKS,), 1, tl.int32)
    tl.atomic_add(there, one, mask=sent, sem="release", scope="sys")
    missing, polls = tl.sum(coming.to(tl.int32), 0), 0
    while missing > 0:
        seen = tl.atomic_add(here, one - 1, mask=coming, sem="acquire", scope="sys")
        # NOTE: the difference is right where the count wraps around
        missing = tl.sum((coming & (seen - awaited < 0)).to(tl.int32), 0)
        polls += 1
        if polls % POLLS_PER_LOOK == 0:  # noqa: SIM102 (`and` would load in every poll)
            if tl.load(stop, volatile=True) != 0:
                missing = 0
    tl.debug_barrier()
    tl.store(count, awaited, mask=coming)


@triton.jit(do_not_specialize=["total_rows", "rank"])
def gather_kernel(
    own, layout, total_rows, row_words, buffers, flags, own_flags, heard, stop, rank,
    SIZE: tl.constexpr, RANKS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    POISON: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write own real rows, as integer words, to all ranks; POISON sets all bits of others: NaN."""
    block, peer = tl.program_id(0), tl.arange(0, RANKS)
    places = _places(buffers, layout, rank, SIZE, own.dtype.element_ty)
    mine, own_first, own_real = places[SIZE - 1]
    theirs = tl.load(layout + SIZE + peer, mask=peer < SIZE, other=0, volatile=True) * WIDTH
    others, there, here, count, awaited = _flags(flags, own_flags, heard, rank, SIZE, RANKS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = block
    while tile < own_real * WIDTH:
        row = (tile // WIDTH).to(tl.int64)
        col = tile % WIDTH * COLS + tl.arange(0, COLS)
        value = tl.load(own + row * row_words + col, mask=col < row_words)
        at = (own_first + row) * row_words + col
        for i in tl.static_range(SIZE):
            tl.store(places[i][0] + at, value, mask=col < row_words)
        tile += tl.num_programs(0)
    if POISON:
        nan = tl.full((COLS,), -1, own.dtype.element_ty)
        for i in tl.static_range(SIZE):
            _, first, real = places[i]
            following = (rank + i + 1) % SIZE + 1
            end = tl.load(layout + tl.minimum(following, SIZE - 1), volatile=True)
            end = tl.where(following < SIZE, end, total_rows)
            tile = real * WIDTH + block
            while tile < (end - first) * WIDTH:
                row = (tile // WIDTH).to(tl.int64)
                col = tile % WIDTH * COLS + tl.arange(0, COLS)
                tl.store(mine + (first + row) * row_words + col, nan, mask=col < row_words)
                tile += tl.num_programs(0)
    sent, coming = _takes_part(others, own_real * WIDTH), _takes_part(others, theirs)
    _raise_and_wait(there, here, count, awaited, sent, coming, stop, RANKS)


@triton.jit(do_not_specialize=["own_rows", "rows_per_rank", "rank"])
def reduce_scatter_kernel(
    partial, out, layout, own_rows, rows_per_rank, row_size, buffers, flags, own_flags, heard, stop,
    rank,
    SIZE: tl.constexpr, RANKS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write each peer's rows to its slot `rank`; sum the own in rank order, 0 where not real."""
    block, peer = tl.program_id(0), tl.arange(0, RANKS)
    slot_size = tl.cast(rows_per_rank, tl.int64) * row_size
    places = _places(buffers, layout, rank, SIZE, partial.dtype.element_ty)
    mine, own_first, own_real = places[SIZE - 1]
    theirs = tl.load(layout + SIZE + peer, mask=peer < SIZE, other=0, volatile=True) * WIDTH
    others, there, here, count, awaited = _flags(flags, own_flags, heard, rank, SIZE, RANKS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for i in tl.static_range(SIZE - 1):
        slots, first, real = places[i]
        tile = block
        while tile < real * WIDTH:
            row = (tile // WIDTH).to(tl.int64)
            col = tile % WIDTH * COLS + tl.arange(0, COLS)
            value = tl.load(partial + (first + row) * row_size + col, mask=col < row_size)
            at = slots + rank * slot_size + row * row_size
            tl.store(at + col, value, mask=col < row_size)
            tile += tl.num_programs(0)
    sent, coming = _takes_part(others, theirs), _takes_part(others, own_real * WIDTH)
    _raise_and_wait(there, here, count, awaited, sent, coming, stop, RANKS)
    own = partial + own_first * row_size
    tile = block
    while tile < own_rows * WIDTH:
        row = (tile // WIDTH).to(tl.int64)
        col = tile % WIDTH * COLS + tl.arange(0, COLS)
        columns = tl.where(row < own_real, row_size, 0)
        total = tl.zeros((COLS,), SUM)
        for source in tl.static_range(SIZE):
            rows = tl.where(source == rank, own, mine + source * slot_size)
            at = rows + row * row_size + col
            total += tl.load(at, mask=col < columns, other=0, volatile=True).to(SUM)
        tl.store(out + row * row_size + col, total.to(out.dtype.element_ty), mask=col < row_size)
        tile += tl.num_programs(0)

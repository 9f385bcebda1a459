"""Triton kernels that move rows between GPUs by writing into the peers' memory.

Program b of a rank writes its share into every peer, then raises flag (b, rank) there, and waits
for the flags that the peers' programs b raise here. A flag holds the number of the call, which the
device counts by itself: a captured graph can be replayed. A wait ends early once the host sets
`stop`; what it waited for is not there then.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_BLOCKS = 128
POLLS_PER_LOOK: tl.constexpr = tl.constexpr(64)  # flag reads between looks at `stop`


@triton.jit
def _raise_and_wait(
    flags, own_flags, calls, stop, rank, SIZE: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    call = tl.load(calls + block) + 1
    tl.debug_barrier()  # every thread's rows are written before the flag is
    for i in tl.static_range(1, SIZE):
        peer = (rank + i) % SIZE
        flag = tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + block * SIZE + rank
        tl.atomic_xchg(flag, call, sem="release", scope="sys")
    for i in tl.static_range(1, SIZE):
        flag = own_flags + block * SIZE + (rank + i) % SIZE
        seen = tl.load(flag, volatile=True)
        polls = 0
        while seen - call < 0:  # NOTE: the difference is right where the count wraps around
            seen = tl.load(flag, volatile=True)
            polls += 1
            if polls % POLLS_PER_LOOK == 0:  # noqa: SIM102 (`and` would load in every poll)
                if tl.load(stop, volatile=True) != 0:
                    seen = call
        tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    tl.store(calls + block, call)


@triton.jit
def gather_kernel(
    own, starts, row_words, buffers, flags, own_flags, calls, stop, rank,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Own rows, as integer words, go to their place in every rank's gathered rows."""
    pointer: tl.constexpr = tl.pointer_type(own.dtype.element_ty)
    first = tl.load(starts + rank).to(tl.int64) * row_words
    words = tl.load(starts + rank + 1).to(tl.int64) * row_words - first
    at = tl.program_id(0).to(tl.int64) * BLOCK
    while at < words:
        index = at + tl.arange(0, BLOCK)
        inside = index < words
        value = tl.load(own + index, mask=inside)
        for i in tl.static_range(SIZE):
            into = tl.load(buffers + (rank + i) % SIZE).to(pointer)
            tl.store(tl.multiple_of(into, 16) + first + index, value, mask=inside)
        at += tl.num_programs(0).to(tl.int64) * BLOCK
    _raise_and_wait(flags, own_flags, calls, stop, rank, SIZE)


@triton.jit
def reduce_scatter_kernel(
    partial, out, starts, row_size, slot_size, own_buffer, buffers, flags, own_flags, calls, stop,
    rank, SIZE: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Each peer's rows go to slot `rank` of its buffer; then the own rows are summed in order."""
    block, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slot_size = tl.cast(slot_size, tl.int64)
    pointer: tl.constexpr = tl.pointer_type(partial.dtype.element_ty)
    for i in tl.static_range(1, SIZE):
        peer = (rank + i) % SIZE
        first = tl.load(starts + peer).to(tl.int64) * row_size
        size = tl.load(starts + peer + 1).to(tl.int64) * row_size - first
        into = tl.multiple_of(tl.load(buffers + peer).to(pointer), 16) + rank * slot_size
        at = block * BLOCK
        while at < size:
            index = at + tl.arange(0, BLOCK)
            value = tl.load(partial + first + index, mask=index < size)
            tl.store(into + index, value, mask=index < size)
            at += blocks * BLOCK
    _raise_and_wait(flags, own_flags, calls, stop, rank, SIZE)
    first = tl.load(starts + rank).to(tl.int64) * row_size
    size = tl.load(starts + rank + 1).to(tl.int64) * row_size - first
    at = block * BLOCK
    while at < size:
        index = at + tl.arange(0, BLOCK)
        inside = index < size
        total = tl.zeros((BLOCK,), SUM)
        for source in tl.static_range(SIZE):
            if source == rank:
                value = tl.load(partial + first + index, mask=inside, other=0)
            else:
                value = tl.load(
                    own_buffer + source * slot_size + index, mask=inside, other=0, volatile=True
                )
            total += value.to(SUM)
        tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)
        at += blocks * BLOCK

"""What runs before a call that is timed cold: see harness/cold_timing.py."""

from __future__ import annotations

import triton
import triton.language as tl

from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait

INSTRUCTIONS = 12 << 10  # of 16 bytes each: more than a multiprocessor keeps
CODE = tl.constexpr("mov.f32 $0, $1;\n" + "fma.rn.f32 $0, $0, $0, $1;\n" * INSTRUCTIONS)


@triton.jit
def cold_code(found):
    at = found + tl.program_id(0) + tl.zeros((1,), tl.int32)
    value = tl.inline_asm_elementwise(
        CODE, "=&f,f", [tl.load(at)], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(at, value)


@triton.jit
def cold_memory(memory, found, num_blocks, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        total += tl.load(memory + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(found + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["size"])
def cold_rows(source, rows, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rows + at, tl.load(source + at, mask=at < size), mask=at < size)

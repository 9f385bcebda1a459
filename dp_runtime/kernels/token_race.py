"""Noise, and which token wins by it, in one pass over wide rows; several programs share a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.kernels.argmax import BLOCK, BLOCKS_AT_ONCE, ordered_key, reduce_keys

U_FACTOR = tl.constexpr((1 - 2.0**-24) * 2.0**-31)  # keeps u below 1


def row_races(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Do as `sampling.token_race.race` does."""
    rows, size = logits.shape
    assert logits.stride(1) == 1, "a row is in one piece"
    assert keys.shape == (rows,), "a key for each row"
    assert keys.dtype == torch.int64, f"keys are int64, not {keys.dtype}"
    parts = triton.cdiv(size, BLOCK * BLOCKS_AT_ONCE)
    winners = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    if rows:
        _part_races[(rows, parts)](
            logits, keys, winners, size, logits.stride(0), parts,
            BLOCK=BLOCK, BLOCKS=BLOCKS_AT_ONCE, num_warps=4,
        )  # fmt: skip
    _, tokens, valid = reduce_keys(winners)
    return tokens, valid


@triton.jit
def _part_races(
    logits, keys, winners, size, stride, parts, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    key = tl.load(keys + row)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    first = part * BLOCK * BLOCKS + lane
    for block in tl.static_range(BLOCKS):
        token = (part * BLOCKS + block) * BLOCK + lane
        inside = token < size
        logit = tl.load(logits + row * stride + token, mask=inside, other=float("-inf"))
        score = logit - tl.log(exponential(key, token))
        better = (score > peak) | (score != score)
        peak, first = tl.where(better, score, peak), tl.where(better, token, first)
    tl.store(winners + row * parts + part, tl.max(ordered_key(peak, first), 0))


@triton.jit
def exponential(key, token):
    """Compute `sampling.token_race.exponentials`; of a small u, 1 - u loses the digits."""
    u = (token_bits(key, token).to(tl.float32) + 0.5) * U_FACTOR
    series = 1 / 5 + u * (1 / 6 + u * (1 / 7))
    series = 1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * series)))
    return tl.where(u < 0.125, u * series, -tl.log(1 - u))


@triton.jit
def token_bits(key, token):
    """Compute `sampling.token_race.token_bits`."""
    bits = token.to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = bits ^ (key >> 32).to(tl.uint32)
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return ((bits ^ (bits >> 16)) & 0x7FFFFFFF).to(tl.int32)

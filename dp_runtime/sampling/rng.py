"""Random numbers as a pure function of seed and index: the same on every device and rank."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Wrap to int64, since torch has no full uint64 arithmetic."""
    return (value + 2**63) % 2**64 - 2**63


def _shift_right(bits: Tensor, count: int) -> Tensor:
    kept: int = 2 ** (64 - count) - 1
    return (bits >> count) & kept


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_SECOND)
    return bits ^ _shift_right(bits, 31)


def derive_seed(seed: int, request_id: int) -> int:
    """Give a request without a seed one in 0..2**63-1."""
    engine = _mix_int(seed + _GOLDEN)
    return _mix_int(engine + _GOLDEN * (request_id + 1)) % 2**63


def _mix_int(value: int) -> int:
    """`_mix` of one number, for which tensors are slow."""
    bits = value % 2**64
    bits = (bits ^ bits >> 30) * _FIRST % 2**64
    bits = (bits ^ bits >> 27) * _SECOND % 2**64
    return bits ^ bits >> 31


def counter_bits(seeds: Tensor, indices: Tensor, stream: int = 0) -> Tensor:
    """Draw [n] int64 of 64 bits by SplitMix64's finaliser (Steele, Lea and Flood, 2014)."""
    # Seed, stream and index are mixed in turn, so that neighbouring seeds share no sequence.
    key = _mix(_mix(seeds + _signed(_GOLDEN)) + _signed(_GOLDEN * (stream + 1)))
    return _mix(key + (indices + 1) * _signed(_GOLDEN))


def uniform(seeds: Tensor, indices: Tensor, stream: int = 0) -> Tensor:
    """Draw [n] float64 from [0, 1)."""
    return _shift_right(counter_bits(seeds, indices, stream), 11).to(torch.float64) * 2.0**-53

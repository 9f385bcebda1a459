"""Tile sizes of the expert kernels, by how many rows an expert has on average."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

FLAT = 16  # programs of a multiprocessor, more than fit it at once: each takes one tile


@dataclass(frozen=True)
class Tile:
    """The tiling of one kernel: block_m pairs by block_n columns, in steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool  # the copy engine reads weights, from capability 9.0 on
    per_multiprocessor: int | None = None  # max programs that share the tiles; None: by expert
    swap: bool = False  # weights are the product's first operand: its 64 rows at least are columns
    regroup: bool = False  # swapped e4m3: 16 columns in the order in which a thread takes them
    f16: bool = False  # e4m3: the product is in f16, to which the GPU itself widens e4m3
    rest: int = 0  # rows of an expert's last tile if it has no more; of counted tiles
    joint: bool = False  # bf16: gate's and up's columns are read as one block, by the copy engine

    @property
    def by_expert(self) -> bool:
        return self.per_multiprocessor is None


@dataclass(frozen=True)
class ExpertTiles:
    gate_up: Tile  # by expert if `down` is, and not if it is not
    down: Tile


E4M3_DOWN = Tile(128, 64, 64, 4, 3, True, FLAT, swap=True)
F16_DOWN = Tile(16, 128, 128, 4, 3, True, swap=True, regroup=True, f16=True)
F16_GATE_UP = replace(F16_DOWN, block_k=64)
F16_SHARED = replace(F16_DOWN, block_m=32, per_multiprocessor=FLAT)
E4M3_TILES = (  # up to so many pairs an expert
    (4, ExpertTiles(replace(F16_GATE_UP, num_stages=5), F16_DOWN)),
    (11, ExpertTiles(F16_GATE_UP, F16_DOWN)),
    (45, ExpertTiles(F16_SHARED, replace(F16_SHARED, block_k=64, per_multiprocessor=3))),
    (90, ExpertTiles(Tile(64, 64, 128, 4, 3, True, FLAT, swap=True), E4M3_DOWN)),
    (
        math.inf,
        ExpertTiles(Tile(64, 128, 64, 4, 4, True, FLAT, swap=True, regroup=True), E4M3_DOWN),
    ),
)


def choose_tiles(
    rows: int, top_k: int, num_experts: int, intermediate: int, fp8: bool
) -> ExpertTiles:
    """Choose tiles that examples/benchmarks/kernels/tune_experts.py found on an H200."""
    per_expert = rows * top_k / num_experts
    if fp8:
        return next(tiles for most, tiles in E4M3_TILES if per_expert <= most)
    return _choose_bf16(per_expert, narrow=intermediate < 512)


def _choose_bf16(per_expert: float, narrow: bool) -> ExpertTiles:
    if per_expert <= 2:
        return ExpertTiles(Tile(16, 64, 64, 8, 3, False), _down_by_expert(16, narrow))
    if per_expert <= 10:
        return ExpertTiles(Tile(16, 64, 128, 4, 3, True), _down_by_expert(16, narrow))
    if per_expert <= 20:
        gate_up = Tile(32, 64 if narrow else 128, 128, 4, 3, True)
        return ExpertTiles(gate_up, _down_by_expert(32, narrow))
    if per_expert <= 48:
        return ExpertTiles(Tile(64, 128, 64, 4, 5, True, FLAT), Tile(64, 128, 64, 4, 4, True, FLAT))
    gate_up = Tile(128, 128, 64, 8, 4, True, FLAT, rest=64, joint=True)
    if narrow and per_expert <= 128:
        return ExpertTiles(gate_up, Tile(64, 128, 64, 4, 3, True, FLAT))
    rest = 64 if per_expert <= 90 else 0
    return ExpertTiles(gate_up, Tile(128, 128, 64, 4, 3, True, 2, rest=rest))


def _down_by_expert(block_m: int, narrow: bool) -> Tile:  # narrow: a product over few columns
    block_k, num_stages = (64, 5) if narrow else (128, 3)
    return Tile(block_m, 128, block_k, 8 if block_m == 16 else 4, num_stages, True)

"""Tile sizes of the expert kernels, by how many rows an expert has on average."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One kernel's tiling: block_m pairs by block_n columns, in steps of block_k.

    split_m programs share an expert's pairs.
    """

    block_m: int
    block_n: int
    block_k: int
    split_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpertTiles:
    """The tiles of the two products."""

    gate_up: Tile
    down: Tile


def choose_tiles(rows: int, top_k: int, num_experts: int, intermediate: int) -> ExpertTiles:
    """Tiles for a number of gathered rows.

    Measured on an H200 for hidden 2048, 128 experts, top 8 and intermediate sizes of 768 and 192:
    examples/benchmarks/moe_stage.py.
    """
    per_expert = rows * top_k / num_experts
    if per_expert <= 2:
        return ExpertTiles(Tile(16, 128, 64, 1, 8, 5), Tile(16, 64, 64, 1, 8, 5))
    if per_expert <= 10:
        return ExpertTiles(Tile(16, 64, 128, 1, 4, 3), Tile(16, 128, 64, 1, 8, 3))
    if per_expert <= 40:
        return ExpertTiles(Tile(32, 64, 128, 1, 4, 5), Tile(32, 128, 128, 1, 4, 3))
    if intermediate < 512:
        wide = per_expert > 128
        gate_up = Tile(128, 128, 64, 2, 8, 4) if wide else Tile(64, 64, 64, 8, 4, 4)
        return ExpertTiles(gate_up, Tile(64, 128, 64, 2, 4, 3))
    return ExpertTiles(Tile(128, 128, 64, 2, 8, 4), Tile(128, 256, 64, 2, 8, 4))

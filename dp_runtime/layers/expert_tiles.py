"""Tile sizes of the expert kernels, by how many rows an expert has on average."""

from __future__ import annotations

from dataclasses import dataclass

FLAT = 16  # more programs to a multiprocessor than run at once: one tile each


@dataclass(frozen=True)
class Tile:
    """One kernel's tiling: block_m pairs by block_n columns, in steps of block_k.

    tma: whether the copy engine reads weights (capability 9.0 and newer; elsewhere the same loads
    are spelled out); at most per_multiprocessor programs are started for each multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool
    per_multiprocessor: int = FLAT


@dataclass(frozen=True)
class ExpertTiles:
    """The tiles of the two products.

    all_active: every local expert probably has rows, so its weights are worth fetching before
    the routing is known.
    """

    gate_up: Tile
    down: Tile
    all_active: bool


def choose_tiles(rows: int, top_k: int, num_experts: int, intermediate: int) -> ExpertTiles:
    """Tiles for a number of gathered rows.

    Found on an H200 for hidden 2048, 128 experts, top 8 and intermediate sizes of 768 and 192:
    examples/benchmarks/tune_experts.py.
    """
    per_expert = rows * top_k / num_experts
    gate_up, down = _tiles(per_expert, intermediate)
    return ExpertTiles(gate_up, down, 3 <= per_expert <= 64)


def _tiles(per_expert: float, intermediate: int) -> tuple[Tile, Tile]:
    if per_expert <= 2:
        return Tile(16, 128, 64, 8, 5, False), Tile(16, 64, 64, 8, 5, False)
    if per_expert <= 10:
        return Tile(16, 64, 128, 4, 3, False), Tile(16, 128, 64, 8, 3, False)
    if per_expert <= 40:
        return Tile(32, 64, 128, 4, 5, False), Tile(32, 128, 128, 4, 3, False)
    if intermediate < 512:
        wide = per_expert > 128
        gate_up = Tile(128, 128, 64, 8, 4, True, 1) if wide else Tile(64, 64, 64, 4, 4, True)
        return gate_up, Tile(64, 128, 64, 4, 3, True)
    return Tile(128, 128, 64, 8, 4, True, 1), Tile(128, 256, 64, 8, 4, True, 1)

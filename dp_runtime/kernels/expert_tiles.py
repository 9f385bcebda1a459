"""Tile sizes of the expert kernels, by how many rows an expert has on average."""

from __future__ import annotations

from dataclasses import dataclass

FLAT = 16  # more programs to a multiprocessor than run at once: one tile each


@dataclass(frozen=True)
class Tile:
    """One kernel's tiling: block_m pairs by block_n columns, in steps of block_k.

    tma: whether the copy engine reads weights (capability 9.0 and newer; elsewhere the same loads
    are spelled out). per_multiprocessor: tiles are counted on the device, and at most so many
    programs are started for each multiprocessor; None: a program for each expert and block of
    columns.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool
    per_multiprocessor: int | None = None

    @property
    def by_expert(self) -> bool:
        return self.per_multiprocessor is None


@dataclass(frozen=True)
class ExpertTiles:
    """The tiles of the two products; both by expert, or neither."""

    gate_up: Tile
    down: Tile


def choose_tiles(rows: int, top_k: int, num_experts: int, intermediate: int) -> ExpertTiles:
    """Tiles for a number of gathered rows.

    Found on an H200 for hidden 2048, 128 experts, top 8 and intermediate sizes of 768 and 192:
    examples/benchmarks/tune_experts.py.
    """
    per_expert = rows * top_k / num_experts
    narrow = intermediate < 512
    if per_expert <= 2:
        return ExpertTiles(Tile(16, 64, 64, 8, 3, False), _down_by_expert(16, narrow))
    if per_expert <= 10:
        return ExpertTiles(Tile(16, 64, 128, 4, 3, True), _down_by_expert(16, narrow))
    if per_expert <= 20:
        gate_up = Tile(32, 64 if narrow else 128, 128, 4, 3, True)
        return ExpertTiles(gate_up, _down_by_expert(32, narrow))
    if per_expert <= 48:
        return ExpertTiles(Tile(64, 128, 64, 4, 5, True, FLAT), Tile(64, 128, 64, 4, 4, True, FLAT))
    if per_expert <= 128:
        down = Tile(64, 128, 64, 4, 3, True, FLAT) if narrow else Tile(128, 128, 64, 4, 3, True, 2)
        return ExpertTiles(Tile(64, 128, 64, 4, 5, True, FLAT), down)
    return ExpertTiles(Tile(128, 128, 64, 8, 4, True, FLAT), Tile(128, 128, 64, 4, 3, True, 2))


def _down_by_expert(block_m: int, narrow: bool) -> Tile:
    """narrow: the product is over few columns."""
    block_k, num_stages = (64, 5) if narrow else (128, 3)
    return Tile(block_m, 128, block_k, 8 if block_m == 16 else 4, num_stages, True)

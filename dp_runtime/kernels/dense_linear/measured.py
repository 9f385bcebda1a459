"""Times of bf16 matrices, by which products of few rows get the faster kernel.

Rows are printed by examples/benchmarks/kernels/dense_bf16.py. So many rows as lie between measured
numbers go as the larger one; more than all, and other matrices, go to cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.kernels.dense_linear.tiles import DenseTile


@dataclass(frozen=True)
class MeasuredProduct:
    outputs: int
    inputs: int
    tile: DenseTile
    times: tuple[tuple[int, float, float], ...]  # rows, microseconds of cuBLAS and of the tile


MEASURED: tuple[MeasuredProduct, ...] = ()


@dataclass(frozen=True)
class EarlyTiles:
    """How one matrix is multiplied."""

    outputs: int
    inputs: int
    by_rows: tuple[tuple[int, DenseTile | None], ...]  # up to so many rows; None: by cuBLAS

    @classmethod
    def of(cls, outputs: int, inputs: int) -> EarlyTiles:
        found = {
            rows: measured.tile if us < cublas else None
            for measured in MEASURED
            if (measured.outputs, measured.inputs) == (outputs, inputs)
            for rows, cublas, us in measured.times
        }
        return cls(outputs, inputs, tuple(sorted(found.items(), key=lambda item: item[0])))

    def choose(self, rows: int) -> DenseTile | None:
        return next((tile for most, tile in self.by_rows if rows <= most), None)

    def sum_bytes(self, rows: int) -> int:
        """Count the most bytes that products of up to so many rows allocate beside results."""
        most = [0]
        for few, tile in self.by_rows:
            if tile is not None:
                most.append(4 * tile.num_sums(min(few, rows), self.outputs))
        return max(most)

    @property
    def tiles(self) -> tuple[DenseTile, ...]:
        return tuple(dict.fromkeys(tile for _, tile in self.by_rows if tile is not None))

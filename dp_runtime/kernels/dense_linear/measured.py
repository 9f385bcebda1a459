"""Times of bf16 matrices, by which products of few rows get the faster kernel.

By examples/benchmarks/kernels/dense_bf16.py. Numbers of rows between measured ones go as the larger
one, if the kernel was faster for both; more than all, and other matrices, go to cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from dp_runtime.kernels.dense_linear.tiles import DenseTile


@dataclass(frozen=True)
class MeasuredProduct:
    outputs: int
    inputs: int
    tile: DenseTile
    times: tuple[tuple[int, float, float], ...]  # rows, microseconds of cuBLAS and of the tile


WORTH = 0.97  # of cuBLAS's time
MEASURED: tuple[MeasuredProduct, ...] = (
    MeasuredProduct(  # the outputs of 30B and 35B
        2048, 4096, DenseTile(16, 64, 128, 4, 4, 4), ((1, 9.1, 7.0), (8, 9.2, 6.8), (16, 9.4, 6.9))
    ),
    MeasuredProduct(2048, 4096, DenseTile(32, 64, 128, 4, 4, 4), ((32, 9.6, 8.1),)),
    MeasuredProduct(  # 35B's queries, keys, values and gates
        9216, 2048, DenseTile(16, 64, 128, 1, 4, 4),
        ((1, 11.5, 14.5), (8, 11.5, 12.1), (16, 11.5, 10.9)),
    ),
    MeasuredProduct(  # the inputs of 35B's delta nets
        12352, 2048, DenseTile(16, 64, 128, 1, 4, 4),
        ((1, 15.7, 17.7), (8, 15.8, 14.9), (16, 15.7, 13.6)),
    ),
    MeasuredProduct(12352, 2048, DenseTile(32, 64, 128, 1, 4, 4), ((32, 16.0, 14.0),)),
    MeasuredProduct(12352, 2048, DenseTile(64, 64, 128, 1, 4, 3), ((64, 16.1, 14.9),)),
    MeasuredProduct(  # the outputs of 397B
        4096, 8192, DenseTile(16, 64, 128, 4, 4, 4),
        ((1, 21.3, 19.2), (8, 21.2, 18.6), (16, 21.4, 18.7)),
    ),
    MeasuredProduct(4096, 8192, DenseTile(32, 64, 128, 4, 4, 4), ((32, 21.9, 19.8),)),
    MeasuredProduct(4096, 8192, DenseTile(64, 64, 128, 4, 4, 3), ((64, 23.2, 22.0),)),
)  # fmt: skip


@dataclass(frozen=True)
class FewRowsTiles:
    """How one matrix is multiplied."""

    outputs: int
    inputs: int
    by_rows: tuple[tuple[int, DenseTile | None], ...]  # up to so many rows; None: by cuBLAS

    @classmethod
    def of(cls, outputs: int, inputs: int) -> FewRowsTiles:
        found = {
            rows: measured.tile if us <= WORTH * cublas else None
            for measured in MEASURED
            if (measured.outputs, measured.inputs) == (outputs, inputs)
            for rows, cublas, us in measured.times
        }
        for less, rows in pairwise(sorted(found)):
            if found[less] is None and less < rows - 1:
                found[rows - 1] = None
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

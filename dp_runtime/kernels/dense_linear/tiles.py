"""How products of few rows are cut into programs."""

from __future__ import annotations

from dataclasses import dataclass, replace

TAIL = 16  # inputs or outputs, to which all alignments are alike


@dataclass(frozen=True)
class DenseTile:
    """The tiling: block_m rows by block_n outputs, the inputs split over programs."""

    block_m: int
    block_n: int
    block_k: int
    split: int  # programs that share a tile, each with its part of the inputs
    num_warps: int
    num_stages: int

    def share(self, inputs: int) -> int:
        """Count the inputs of each part but the last, which may have fewer."""
        return -(-inputs // (self.split * self.block_k)) * self.block_k

    def kind(self, inputs: int) -> tuple[DenseTile, int]:
        """Give the simplest tile, and few inputs, for which the same kernel is compiled."""
        simple = replace(self, split=min(self.split, 2))
        tail = 0 if inputs == self.split * self.share(inputs) else TAIL
        return simple, simple.split * self.block_k - tail

    def num_tiles(self, rows: int, outputs: int) -> int:
        return -(-rows // self.block_m) * -(-outputs // self.block_n)

    def num_sums(self, rows: int, outputs: int) -> int:
        """Count the float32 that programs leave for each other."""
        area = self.block_m * self.block_n
        return 0 if self.split == 1 else self.split * self.num_tiles(rows, outputs) * area

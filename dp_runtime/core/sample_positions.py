"""SamplePositions: the output tokens that the sampled rows of a step become."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.core.batch import Int64


@dataclass(frozen=True, eq=False)
class SamplePositions:
    req_indices: Int64  # [n] rows of the request table
    output_indices: Int64  # [n] which output token of its request this is, from 0

    def __len__(self) -> int:
        return len(self.req_indices)

    def __getitem__(self, rows: slice) -> SamplePositions:
        return SamplePositions(self.req_indices[rows], self.output_indices[rows])

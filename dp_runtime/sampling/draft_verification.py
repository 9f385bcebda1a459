"""Verification of drafted tokens; docs/speculation.md proves that it is rejection sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import Int64, SamplePositions
from dp_runtime.errors import require
from dp_runtime.sampling.rng import uniform

T = TypeVar("T")
_FORCED_STREAM = 1  # of random numbers; tokens are drawn from stream 0


def accepted_drafts(sampled: Tensor, drafts: Tensor) -> Tensor:
    """Count the drafts [n, s] before each chain's first that differs from sampled [n, s + 1]."""
    num_drafts = drafts.shape[1]
    assert sampled.shape == (len(drafts), num_drafts + 1), (
        f"tokens {tuple(sampled.shape)} sampled for drafts {tuple(drafts.shape)}"
    )
    equal = sampled[:, :num_drafts] == drafts
    return equal.cumprod(1, dtype=torch.int64).sum(1)


@dataclass(frozen=True)
class ForcedAcceptance:
    """Accepts so many tokens whatever was drafted, for measurements; the text is meaningless."""

    mean_tokens: float  # that a verification emits, the one after the drafts included; >= 1

    def __post_init__(self) -> None:
        ok = isinstance(self.mean_tokens, int | float) and 1 <= self.mean_tokens < float("inf")
        require(ok, "mean_tokens", self.mean_tokens, "a number of at least 1")

    def accepted(self, seeds: Tensor, indices: Tensor, num_drafts: int) -> Tensor:
        floor = int(self.mean_tokens - 1)
        more = uniform(seeds, indices, _FORCED_STREAM) < self.mean_tokens - 1 - floor
        return (more.to(torch.int64) + floor).clamp_(max=num_drafts)


@dataclass(frozen=True, eq=False)
class Verification:
    """The drafts of the first n requests of a batch, whose rows are its first n * (s + 1)."""

    drafts: Tensor  # [n, s] int64
    forced: ForcedAcceptance | None = None

    def __len__(self) -> int:
        return len(self.drafts)

    @property
    def num_drafts(self) -> int:
        return self.drafts.shape[1]

    @property
    def rows_each(self) -> int:
        return self.num_drafts + 1

    @property
    def num_rows(self) -> int:
        return len(self) * self.rows_each

    @classmethod
    def none(cls, device: torch.device) -> Verification:
        return cls(torch.zeros((0, 0), dtype=torch.int64, device=device))

    def rows_of(self, request: int) -> slice:
        if request < len(self):
            return slice(request * self.rows_each, (request + 1) * self.rows_each)
        row = self.num_rows + request - len(self)
        return slice(row, row + 1)

    def each_row(self, requests: list[T]) -> list[T]:
        verified, others = requests[: len(self)], requests[len(self) :]
        return [request for request in verified for _ in range(self.rows_each)] + others

    def drafts_read(self, rows: Int64) -> tuple[Int64, Int64]:
        """Return the chain of each row, and how many of its drafts the row has as inputs."""
        chains, num_read = np.divmod(rows, self.rows_each)
        num_read[rows >= self.num_rows] = 0
        return chains, num_read

    def assumed(self, rows: Int64) -> tuple[Int64, Int64]:
        """Pair places in `rows` with those in `drafts.flatten()` that the rows have as inputs."""
        chains, num_read = self.drafts_read(rows)
        places = np.arange(len(rows)).repeat(num_read)
        within = np.arange(len(places)) - (num_read.cumsum() - num_read).repeat(num_read)
        return places, chains[places] * self.num_drafts + within

    def emitted(self, accepted: Tensor | None, num_rows: int) -> Tensor:
        emitted = torch.ones(num_rows, dtype=torch.float32, device=self.drafts.device)
        if accepted is not None:
            places = torch.arange(self.rows_each, device=self.drafts.device)
            emitted[: self.num_rows] = (places <= accepted[:, None]).flatten()
        return emitted


def first_positions(positions: SamplePositions, verification: Verification) -> SamplePositions:
    shape = len(verification), verification.rows_each
    end = verification.num_rows
    requests = positions.req_indices[:end].reshape(shape)
    indices = positions.output_indices[:end].reshape(shape)
    in_turn = indices[:, :1] + np.arange(verification.rows_each)
    together = (requests == requests[:, :1]) & (indices == in_turn)
    assert together.all(), f"the first {end} rows are {len(verification)} verifications"
    return SamplePositions(
        np.concatenate([requests[:, 0], positions.req_indices[end:]]),
        np.concatenate([indices[:, 0], positions.output_indices[end:]]),
    )


@dataclass(frozen=True, eq=False)
class LastAccepted:
    rows: Tensor  # [requests] int64, of a draft_extend pass: those that read the next field
    token_ids: Tensor  # [requests] int64, the last emitted
    num_rejected: Tensor  # [requests] int64 drafts; 0 for chunks

    @classmethod
    def after_verification(
        cls,
        *,
        first_rows: Tensor,  # [requests] int64, as the next three; verifications, then chunks
        first_samples: Tensor,  # index into sampled_tokens [n]; -1: take known_tokens
        known_tokens: Tensor | None,  # None: no sample is -1
        max_accepted: Tensor,
        sampled_tokens: Tensor,
        num_accepted: Tensor,  # [verifications] int64
    ) -> LastAccepted:
        """Advance each request's first row by its accepted drafts; of chunks it is the last row."""
        num_chunks = len(first_rows) - len(num_accepted)
        accepted = num_accepted
        if num_chunks:
            accepted = torch.nn.functional.pad(num_accepted, (0, num_chunks))
        samples = first_samples + accepted
        if known_tokens is None:
            token_ids = sampled_tokens[samples]
        elif len(sampled_tokens):
            chosen = sampled_tokens[samples.clamp(min=0)]
            token_ids = torch.where(samples < 0, known_tokens, chosen)
        else:
            token_ids = known_tokens
        return cls(first_rows + accepted, token_ids, max_accepted - accepted)

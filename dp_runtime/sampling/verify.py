"""Verification of drafted tokens against what the target's own rows gave.

Drafts are chains d_1..d_s, each the most likely token of the draft model, so the proposal is a
point mass. Rejection sampling (Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding", 2023; Chen et al., "Accelerating Large Language Model Decoding with Speculative
Sampling", 2023) accepts a proposed token x with probability min(1, p(x) / q(x)), here p(d), and
else draws from the normalised max(0, p - q), here p without d. Drawing y from p and accepting d
where y == d does both at once: y is d with probability p(d), and otherwise it is distributed as p
without d. So every row is sampled as if it stood alone, by its seed and output index, and the
drafts are accepted up to the first that differs. The tokens are those of serving without
speculation, one for one, not just in distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import Int64
from dp_runtime.core.sample_positions import SamplePositions
from dp_runtime.errors import require
from dp_runtime.sampling.rng import uniform

T = TypeVar("T")
_FORCED_STREAM = 1  # of random numbers; tokens are drawn from stream 0


def accepted_drafts(sampled: Tensor, drafts: Tensor) -> Tensor:
    """How many drafts of each chain the target agrees with, up to the first that it does not.

    sampled [n, s + 1] int64: the target's token at each row; row i, whose inputs end with draft i,
    yields the token that draft i + 1 proposed. drafts [n, s] int64. Returns [n] int64 in 0..s, on
    the device, without waiting for it.
    """
    num_drafts = drafts.shape[1]
    assert sampled.shape == (len(drafts), num_drafts + 1), (
        f"tokens {tuple(sampled.shape)} sampled for drafts {tuple(drafts.shape)}"
    )
    equal = sampled[:, :num_drafts] == drafts
    return equal.cumprod(1, dtype=torch.int64).sum(1)


@dataclass(frozen=True)
class ForcedAcceptance:
    """Accepts so many tokens whatever was drafted, to measure the speed that better drafts have.

    mean_tokens: how many a verification emits on average, the one after the drafts included; at
    least 1, ValueError otherwise. Between two integers it is one or the other, by chance, as a
    pure function of seed and output index. The text is that of nobody: rows after a rejected
    draft were computed from it.
    """

    mean_tokens: float

    def __post_init__(self) -> None:
        ok = isinstance(self.mean_tokens, int | float) and 1 <= self.mean_tokens < float("inf")
        require(ok, "mean_tokens", self.mean_tokens, "a number of at least 1")

    def accepted(self, seeds: Tensor, indices: Tensor, num_drafts: int) -> Tensor:
        """Drafts to accept for each (seed, output index): [n] int64, at most num_drafts."""
        least = int(self.mean_tokens - 1)
        more = uniform(seeds, indices, _FORCED_STREAM) < self.mean_tokens - 1 - least
        return (more.to(torch.int64) + least).clamp_(max=num_drafts)


@dataclass(frozen=True, eq=False)
class Verification:
    """The drafts of the first n requests of a batch, whose rows are its first n * (s + 1)."""

    drafts: Tensor  # [n, s] int64
    forced: ForcedAcceptance | None = None

    def __len__(self) -> int:
        return len(self.drafts)

    @property
    def num_drafts(self) -> int:
        """Of each request."""
        return self.drafts.shape[1]

    @property
    def rows_each(self) -> int:
        return self.num_drafts + 1

    @property
    def num_rows(self) -> int:
        return len(self) * self.rows_each

    @classmethod
    def none(cls, device: torch.device) -> Verification:
        """No drafts: every row is a request of its own."""
        return cls(torch.zeros((0, 0), dtype=torch.int64, device=device))

    def rows_of(self, number: int) -> slice:
        """The rows of the batch's request of that number."""
        if number < len(self):
            return slice(number * self.rows_each, (number + 1) * self.rows_each)
        row = self.num_rows + number - len(self)
        return slice(row, row + 1)

    def each_row(self, requests: list[T]) -> list[T]:
        """What the requests of the batch have, row by row."""
        verified, others = requests[: len(self)], requests[len(self) :]
        return [one for one in verified for _ in range(self.rows_each)] + others

    def assumed(self, rows: Int64) -> tuple[Int64, Int64]:
        """The drafts that rows of the batch take for accepted: those among their own inputs.

        Returns, for every such pair, the place in `rows` and that of the draft in
        `drafts.flatten()`.
        """
        chains, depths = np.divmod(rows, self.rows_each)
        depths[rows >= self.num_rows] = 0
        places = np.arange(len(rows)).repeat(depths)
        within = np.arange(len(places)) - (depths.cumsum() - depths).repeat(depths)
        return places, chains[places] * self.num_drafts + within

    def emitted(self, accepted: Tensor | None, num_rows: int) -> Tensor:
        """Which of the batch's rows gave new tokens: [num_rows] float32, 1 or 0.

        accepted [n] int64: drafts of each chain.
        """
        emitted = torch.ones(num_rows, dtype=torch.float32, device=self.drafts.device)
        if accepted is not None:
            places = torch.arange(self.rows_each, device=self.drafts.device)
            emitted[: self.num_rows] = (places <= accepted[:, None]).flatten()
        return emitted


def first_positions(positions: SamplePositions, verification: Verification) -> SamplePositions:
    """The position of each request's first row; a verification has several rows a request."""
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
    """The last emitted token of each request of a draft_extend pass, and the row that read it."""

    rows: Tensor  # [requests] int64, of the pass
    token_ids: Tensor  # [requests] int64
    num_rejected: Tensor  # [requests] int64 drafts; 0 for chunks

    @classmethod
    def after_verification(
        cls,
        *,
        first_rows: Tensor,
        first_samples: Tensor,
        known_tokens: Tensor,
        max_accepted: Tensor,
        sampled_tokens: Tensor,
        num_accepted: Tensor,
    ) -> LastAccepted:
        """Move on from each request's first row by as many drafts as were accepted.

        All but the last two are [requests] int64, verifications first, then chunks, of which the
        first row is the only one that matters. first_samples: the index of the row's token among
        sampled_tokens [n] int64; -1: it is in known_tokens. num_accepted [verifications] int64.
        """
        num_chunks = len(first_rows) - len(num_accepted)
        accepted = torch.nn.functional.pad(num_accepted, (0, num_chunks))
        rows, samples, token_ids = first_rows + accepted, first_samples + accepted, known_tokens
        if len(sampled_tokens):
            chosen = sampled_tokens[samples.clamp(min=0)]
            token_ids = torch.where(samples < 0, known_tokens, chosen)
        return cls(rows, token_ids, max_accepted - accepted)

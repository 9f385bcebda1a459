"""Samplers whose requests lie in the rows of the table that their ids name."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import SamplePositions
from dp_runtime.core.request import RankRequest
from dp_runtime.sampling.draft_verification import Verification
from dp_runtime.sampling.row_logits import RowLogits
from dp_runtime.sampling.sampler import Sampled, Sampler

NUM_ROWS = 10_000


def sampler_of(*requests: RankRequest, vocab: int = 50, device: str = "cpu") -> Sampler:
    sampler = Sampler(vocab, NUM_ROWS, torch.device(device))
    for item in requests:
        sampler.add(item.request_id, item, ())
    return sampler


def rows_of(*rows: tuple[int, int]) -> SamplePositions:
    """Rows of (request id, output index)."""
    return SamplePositions(*np.array(rows, np.int64).reshape(-1, 2).T)


def sample(
    sampler: Sampler,
    logits: Tensor,
    rows: SamplePositions,
    verification: Verification | None = None,
) -> Sampled:
    return sampler.sample(RowLogits.from_logits(logits), rows, verification)

"""The gated delta rule (arXiv 2412.06464) in plain torch: token by token, and in chunks.

Per head, with a state S [k_dim, v_dim] and a row's q, k, v, decay g <= 0 and strength beta:
S = exp(g) S;  S += k (x) beta (v - k S);  o = q S
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.core.recurrent_metadata import CHUNK, MAX_STEPPED


@dataclass(frozen=True, eq=False)
class DeltaRows:
    """Rows of sequences of one length, in float32."""

    q: Tensor  # [sequences, heads, rows, k_dim], normed and scaled
    k: Tensor  # [sequences, heads, rows, k_dim], normed
    v: Tensor  # [sequences, heads, rows, v_dim]
    g: Tensor  # [sequences, heads, rows], the logarithm of the decay
    beta: Tensor  # [sequences, heads, rows]

    @property
    def length(self) -> int:
        return self.g.shape[2]

    def span(self, start: int, end: int | None) -> DeltaRows:
        rows = slice(start, end)
        return DeltaRows(*(x[:, :, rows] for x in (self.q, self.k, self.v, self.g, self.beta)))

    def padded(self, rows: int) -> DeltaRows:
        """Append rows that leave the state as it is."""
        if not rows:
            return self
        q, k, v = (F.pad(x, (0, 0, 0, rows)) for x in (self.q, self.k, self.v))
        return DeltaRows(q, k, v, F.pad(self.g, (0, rows)), F.pad(self.beta, (0, rows)))

    def chunked(self, size: int) -> DeltaRows:
        """Split the rows: [sequences, heads, chunks, size, ...]."""

        def split(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])

        return DeltaRows(*map(split, (self.q, self.k, self.v, self.g, self.beta)))


def delta_rule(rows: DeltaRows, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run rows on a state [sequences, heads, k_dim, v_dim]; return outputs and the new state."""
    run = run_recurrent if rows.length <= MAX_STEPPED else run_chunks
    return run(rows, state)


def run_recurrent(rows: DeltaRows, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for row in range(rows.length):
        q, k, v = rows.q[:, :, row], rows.k[:, :, row], rows.v[:, :, row]
        state = state * rows.g[:, :, row].exp()[..., None, None]
        change = (v - _read(state, k)) * rows.beta[:, :, row, None]
        state = state + k[..., None] * change[..., None, :]
        outputs.append(_read(state, q))
    return torch.stack(outputs, 2), state


def _read(state: Tensor, row: Tensor) -> Tensor:
    return (state * row[..., None]).sum(-2)


def run_chunks(rows: DeltaRows, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run chunk by chunk; within one, all changes of the state follow from a triangular system."""
    length, size = rows.length, min(CHUNK, rows.length)
    chunks = rows.padded(-length % size).chunked(size)
    total = chunks.g.cumsum(-1)  # the logarithm of the decay since the chunk began
    later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    # NOTE: differences are exponentiated, never sums alone: exp(-total) overflows.
    between = (total[..., :, None] - total[..., None, :]).masked_fill_(later, -torch.inf).exp_()
    values, reads = _solve(chunks, total, between)
    scores = (chunks.q @ chunks.k.mT).mul_(between)
    q = chunks.q * total.exp()[..., None]
    k = chunks.k * (total[..., -1:] - total).exp()[..., None]
    decay = total[..., -1].exp()[..., None, None]
    outputs = []
    for i in range(q.shape[2]):
        change = values[:, :, i] - reads[:, :, i] @ state
        outputs.append(q[:, :, i] @ state + scores[:, :, i] @ change)
        state = state * decay[:, :, i] + k[:, :, i].mT @ change
    return torch.cat(outputs, 2)[:, :, :length], state


def _solve(chunks: DeltaRows, total: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's change for a state of zeros, and how it reads the state at the begin."""
    strength = chunks.beta[..., None]
    system = (strength * chunks.k @ chunks.k.mT).mul_(between)  # only what lies below is read
    read = strength * total.exp()[..., None] * chunks.k
    right = torch.cat((strength * chunks.v, read), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, reads = solved.tensor_split([chunks.v.shape[-1]], -1)
    return values, reads


def scratch_bytes(rows: int, sequences: int, heads: int, k_dim: int, v_dim: int) -> int:
    """Count the most bytes that `delta_rule` allocates for rows of so many sequences at once."""
    padded = 2 * k_dim + v_dim
    solving = 2 * CHUNK + 2 * (k_dim + v_dim)
    running = 2 * CHUNK + 3 * (k_dim + v_dim)
    states = 4 * sequences * k_dim * v_dim
    return 4 * heads * (rows * (padded + max(solving, running)) + states)

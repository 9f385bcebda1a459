"""The gated delta rule: in chunks, token by token, and as its definition says, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.layers.delta_rule import DeltaRows, delta_rule, run_chunks, run_recurrent


def draw(length: int, decay: float = 1.0, seed: int = 0) -> tuple[DeltaRows, Tensor]:
    """Rows of two sequences with three heads, and a state that they begin with."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = normal(2, 3, length, 8), normal(2, 3, length, 8), normal(2, 3, length, 5)
    g = -F.softplus(normal(2, 3, length)) * decay
    beta = normal(2, 3, length).sigmoid()
    rows = DeltaRows(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta)
    return rows, normal(2, 3, 8, 5)


def by_definition(rows: DeltaRows, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (x.double() for x in (rows.q, rows.k, rows.v, rows.g, rows.beta))
    state, outputs = state.double(), torch.zeros_like(v)
    for sequence in range(q.shape[0]):
        for head in range(q.shape[1]):
            s = state[sequence, head].clone()
            for t in range(q.shape[2]):
                s = s * g[sequence, head, t].exp()
                key = k[sequence, head, t]
                error = v[sequence, head, t] - key @ s
                s = s + torch.outer(key, error) * beta[sequence, head, t]
                outputs[sequence, head, t] = q[sequence, head, t] @ s
            state[sequence, head] = s
    return outputs, state


@pytest.mark.parametrize("length", [1, 2, 8, 9, 63, 64, 65, 130])
@pytest.mark.parametrize("run", [delta_rule, run_chunks, run_recurrent])
def test_both_forms_are_the_definition(run: object, length: int) -> None:
    rows, state = draw(length)
    before = state.clone()
    outputs, new = run(rows, state)  # type: ignore[operator]
    due, due_state = by_definition(rows, before)
    torch.testing.assert_close(outputs.double(), due, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(new.double(), due_state, atol=2e-5, rtol=2e-5)
    assert torch.equal(state, before), "the state that it begins with is the caller's"


@pytest.mark.parametrize("decay", [0.0, 1e-4, 40.0, 1e4])
def test_no_decay_is_too_weak_or_too_strong_31(decay: float) -> None:
    rows, state = draw(130, decay)
    outputs, new = run_chunks(rows, state)
    due, due_state = by_definition(rows, state)
    torch.testing.assert_close(outputs.double(), due, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(new.double(), due_state, atol=1e-4, rtol=1e-4)


def test_rows_that_pad_a_chunk_leave_the_state_as_it_is_6() -> None:
    rows, state = draw(20)
    _, new = run_chunks(rows, state)
    _, padded = run_chunks(rows.padded(44), state)
    torch.testing.assert_close(padded, new, atol=1e-6, rtol=1e-6)

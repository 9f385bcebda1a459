from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_runtime.sampling import token_race
from dp_runtime.sampling.rng import counter_bits
from dp_runtime.sampling.token_race import exponentials, race, token_bits
from tests import draws

KEYS = [0, 1, 2**32, 2**63 - 1, -1, -(2**63), 0x0123456789ABCDEF]
INF, NAN = float("inf"), float("nan")


def keys_of(seeds: range, indices: range) -> Tensor:
    """Every index of every seed: [seeds * indices]."""
    grid = torch.cartesian_prod(torch.tensor(seeds), torch.tensor(indices))
    return counter_bits(grid[:, 0], grid[:, 1])


def logits_of(rows: int, vocab: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * scale


def test_bits_and_times_are_those_of_exact_integers() -> None:
    keys = torch.tensor(KEYS)
    bits, times = token_bits(keys, 700), exponentials(keys, 700)
    for row, key in enumerate(KEYS):
        assert bits[row].tolist() == draws.token_bits(key, 700).tolist()
        exact = torch.from_numpy(draws.exponentials(key, 700))
        torch.testing.assert_close(times[row].double(), exact, rtol=1e-6, atol=0)


def test_known_bits_stay() -> None:
    """A change of these changes every seeded output that users have recorded."""
    found = token_bits(counter_bits(torch.tensor([42]), torch.tensor([7])), 151_936)[0]
    assert found[[0, 1, 2, 151_935]].tolist() == [235045725, 1241794506, 775512, 107051446]


def test_times_at_the_ends_are_finite() -> None:
    ends = torch.tensor([[0, 1, 2**31 - 2, 2**31 - 1]], dtype=torch.int32)
    with patch.object(token_race, "token_bits", return_value=ends):
        first, second, *last = exponentials(torch.tensor([1]), 4)[0].tolist()
    assert first == pytest.approx(2.0**-32)
    assert second == pytest.approx(3 * 2.0**-32)
    assert all(16 < time < 17 for time in last)


def test_what_may_not_be_drawn_never_wins() -> None:
    """Not even where the only other token has the latest time there is."""
    logits = torch.full((500, 300), -INF)
    alone = torch.arange(500) % 300
    logits[torch.arange(500), alone] = 0
    keys = keys_of(range(5), range(100))
    assert torch.equal(race(logits, keys)[0], alone)
    late = torch.full((1, 3), 2**31 - 1, dtype=torch.int32)
    early = torch.tensor([[0, 0, 2**31 - 1]], dtype=torch.int32)
    for bits in (late, early):
        with patch.object(token_race, "token_bits", return_value=bits):
            tokens, valid = race(torch.tensor([[-INF, -INF, 0.0]]), torch.tensor([1]))
        assert (tokens.tolist(), valid.tolist()) == ([2], [True])


def test_equal_arrivals_go_to_the_lowest_id() -> None:
    same = torch.full((1, 4), 12_345, dtype=torch.int32)
    with patch.object(token_race, "token_bits", return_value=same):
        assert race(torch.tensor([[-1.0, 0.0, 0.0, -2.0]]), torch.tensor([1]))[0].tolist() == [1]


def test_rows_without_a_winner_are_told() -> None:
    logits = torch.zeros(6, 4)
    logits[1, 2], logits[2, 0], logits[3], logits[4, :3] = NAN, INF, -INF, -INF
    tokens, valid = race(logits, torch.arange(6))
    assert valid.tolist() == [True, False, False, False, True, True]
    assert ((tokens >= 0) & (tokens < 4)).all()


@pytest.mark.parametrize("vocab", [1, 37, 1003, 70_001])
def test_a_row_is_the_same_in_any_batch(vocab: int) -> None:
    """Whatever its place, its neighbours, and how many are taken at once."""
    rows = 40 if vocab < 2000 else 5
    logits, keys = logits_of(rows, vocab), keys_of(range(rows), range(1))
    tokens, _ = race(logits, keys)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    assert torch.equal(race(logits[order], keys[order])[0], tokens[order])
    for row in range(rows):
        part = slice(row, row + 1)
        assert race(logits[part], keys[part])[0].item() == tokens[row]
        alone = exponentials(keys[part], vocab)
        assert torch.equal(exponentials(keys[: row + 1], vocab)[row], alone[0])
    with patch.object(token_race, "NUMBERS_AT_ONCE", 3 * vocab):
        assert torch.equal(race(logits, keys)[0], tokens)


def test_rounding_changes_no_draw_but_at_a_tie() -> None:
    """By the inverse of the cumulative distribution, 12 of these 20,000 draws would change."""
    logits, keys = logits_of(200, 1000), keys_of(range(100), range(200))
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    rounded = logits * (1 + 4e-6 * noise)
    assert not torch.equal(logits, rounded)
    for part in keys.split(200):
        assert torch.equal(race(logits, part)[0], race(rounded, part)[0])


def chi_square(values: Tensor, bins: int) -> float:
    counts = torch.bincount(values.flatten(), minlength=bins).double()
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


@pytest.mark.parametrize("shift", [23, 12, 0])
@pytest.mark.parametrize("axis", ["seeds", "indices", "tokens"])
def test_bits_are_uniform(axis: str, shift: int) -> None:
    many = range(100_000)
    if axis == "tokens":
        bits = token_bits(keys_of(range(3, 4), range(5, 6)), len(many))[0]
    else:
        keys = keys_of(many, range(5, 6)) if axis == "seeds" else keys_of(range(3, 4), many)
        bits = token_bits(keys, 60)[:, 59]
    # 255 degrees of freedom: standard deviation 22.6; 5 of them to either side.
    assert 140 < chi_square(bits >> shift & 0xFF, 256) < 370


@pytest.mark.parametrize(
    "step", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, -1, 0), (0, 0, 64)]
)
def test_neighbours_are_independent(step: tuple[int, int, int]) -> None:
    """Of the bits, and of those that decide: which of 16 tokens in a row comes first."""
    seed, index, token = step
    here = token_bits(keys_of(range(200), range(1, 201)), 400)
    there = token_bits(keys_of(range(seed, 200 + seed), range(1 + index, 201 + index)), 400)
    first, second = here[:, 100:116], there[:, 100 + token : 116 + token]
    # A correlation of independent numbers has standard deviation 1/800 here.
    pairs = np.corrcoef(first.flatten(), second.flatten())
    assert abs(pairs[0, 1]) < 5 / 800
    assert 140 < chi_square((first >> 27) * 16 + (second >> 27), 256) < 370
    if token in (0, 64):  # the same tokens, or none of them
        assert 140 < chi_square(first.argmin(1) * 16 + second.argmin(1), 256) < 370


@pytest.mark.parametrize("vocab", [3, 150_000])
def test_equal_tokens_come_first_equally_often(vocab: int) -> None:
    draws_of_a_row, rows = (30_000, 1) if vocab == 3 else (3_000, 2)
    keys = keys_of(range(rows), range(draws_of_a_row // rows))
    tokens = torch.cat([race(torch.zeros(len(part), vocab), part)[0] for part in keys.split(200)])
    assert chi_square(tokens * 3 // vocab, 3) < 2 + 5 * 2

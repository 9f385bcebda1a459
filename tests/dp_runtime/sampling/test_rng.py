import numpy as np
import pytest
import torch

from dp_runtime.sampling.rng import derive_seed, uniform

MASK = 2**64 - 1


def split_mix(state: int) -> int:
    """The finaliser of SplitMix64, on Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def reference(seed: int, index: int, stream: int) -> float:
    golden = 0x9E3779B97F4A7C15
    key = split_mix((split_mix((seed + golden) & MASK) + golden * (stream + 1)) & MASK)
    return (split_mix((key + golden * (index + 1)) & MASK) >> 11) / 2**53


def draw(seeds: list[int], indices: list[int], stream: int = 0) -> np.ndarray:
    return uniform(torch.tensor(seeds), torch.tensor(indices), stream).numpy()


def test_split_mix_is_the_published_one() -> None:
    # The first outputs of Vigna's splitmix64.c from state 1234567.
    golden = 0x9E3779B97F4A7C15
    outputs = [split_mix((1234567 + golden * n) & MASK) for n in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("stream", [0, 1, 7])
def test_values_are_those_of_exact_integers(stream: int) -> None:
    seeds = [0, 1, 2, 12345, 2**31, 2**62 + 17, 2**63 - 1]
    indices = [0, 1, 5, 1000, 2**20, 3, 0]
    expected = [reference(seed, index, stream) for seed, index in zip(seeds, indices)]
    assert draw(seeds, indices, stream).tolist() == expected


def test_known_values_stay() -> None:
    """A change of these changes every seeded output that users have recorded."""
    known = [0.13870941014555427, 0.9711020828012883, 0.3869742762400409]
    assert draw([0, 0, 42], [0, 1, 0]).tolist() == known


def chi_square(values: np.ndarray, bins: int) -> float:
    counts = np.bincount((values * bins).astype(int), minlength=bins)
    expected = len(values) / bins
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("axis", ["seeds", "indices"])
def test_uniform(axis: str) -> None:
    count = list(range(100_000))
    fixed = [3] * len(count)
    values = draw(count, fixed) if axis == "seeds" else draw(fixed, count)
    assert ((values >= 0) & (values < 1)).all()
    # 255 degrees of freedom: standard deviation 22.6; 5 of them to either side.
    assert 140 < chi_square(values, 256) < 370


@pytest.mark.parametrize(
    ("seed_step", "index_step", "stream_step"),
    [(1, 0, 0), (0, 1, 0), (1, 1, 0), (1, -1, 0), (0, 0, 1), (0x1E3779B97F4A7C15, 0, 0)],
)
def test_neighbours_are_independent(seed_step: int, index_step: int, stream_step: int) -> None:
    grid = np.arange(90_000)
    seeds, indices = grid // 300, grid % 300 + 1
    here = draw(seeds.tolist(), indices.tolist())
    there = draw((seeds + seed_step).tolist(), (indices + index_step).tolist(), stream_step)
    # A correlation of independent numbers has standard deviation 1/300 here.
    assert abs(np.corrcoef(here, there)[0, 1]) < 5 / 300
    pairs = (here * 16).astype(int) * 16 + (there * 16).astype(int)
    expected = len(pairs) / 256
    spread = ((np.bincount(pairs, minlength=256) - expected) ** 2 / expected).sum()
    assert 140 < spread < 370


def test_derived_seeds_are_distinct_and_depend_on_both() -> None:
    seeds = {derive_seed(seed, request) for seed in range(20) for request in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, 4) == derive_seed(3, 4)
    assert derive_seed(2**63 - 1, 2**40) >= 0

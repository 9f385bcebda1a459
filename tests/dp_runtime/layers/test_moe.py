"""The MoE stage against a loop over rows and experts, over ranks that are threads."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.layers.expert_layouts import ExpertNames, ExpertShape
from dp_runtime.layers.experts import Experts
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import TorchMoe
from dp_runtime.layers.moe_router import Router
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.parallel.row_exchange import PaddedExchange
from dp_runtime.weights.dummy import DummyWeights
from dp_runtime.weights.source import Part
from tests.dp_runtime.thread_ranks import ThreadCollective, run_ranks

HIDDEN, TOP_K = 32, 2
NAMES = ExpertNames("gate_proj", "up_proj", "down_proj")
BOTH = (PaddingMode.MAX_LEN, PaddingMode.RAGGED)


class LargeWeights(DummyWeights):
    """Dummy weights, scaled so that experts and routing matter."""

    def load(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        return super().load(name, shape, part) * 10


def source() -> LargeWeights:
    return LargeWeights(0, torch.device("cpu"), torch.float32)


def build_stage(
    sharding: RankSharding, num_experts: int, intermediate: int, renormalize: bool = True
) -> MoeStage:
    weights = source()
    shard = sharding.shard(num_experts, intermediate)
    gate = Linear.load(weights, {"gate": num_experts}, HIDDEN)
    experts = Experts.load(
        weights, "experts", NAMES, ExpertShape(num_experts, HIDDEN, intermediate), shard
    )
    return MoeStage(Router(gate, TOP_K, renormalize), experts, TorchMoe())


def dense(rows: Tensor, num_experts: int, intermediate: int, renormalize: bool = True) -> Tensor:
    """The stage's meaning, one row and one expert at a time, in float64."""
    weights, out = source(), torch.zeros_like(rows, dtype=torch.float64)
    gate = weights.load("gate.weight", (num_experts, HIDDEN)).double()
    for index, row in enumerate(rows.double()):
        probabilities, ids = (gate @ row).softmax(0).topk(TOP_K)
        if renormalize:
            probabilities = probabilities / probabilities.sum()
        for probability, expert in zip(probabilities, ids.tolist()):
            matrices = {
                name: weights.load(f"experts.{expert}.{name}.weight", shape).double()
                for name, shape in (
                    ("gate_proj", (intermediate, HIDDEN)),
                    ("up_proj", (intermediate, HIDDEN)),
                    ("down_proj", (HIDDEN, intermediate)),
                )
            }
            hidden = F.silu(matrices["gate_proj"] @ row) * (matrices["up_proj"] @ row)
            out[index] += probability * (matrices["down_proj"] @ hidden)
    return out


@functools.cache
def rank_rows(counts: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(count, HIDDEN, generator=generator) for count in counts)


def run_stage(
    counts: tuple[int, ...],
    moe_sharding: str,
    mode: PaddingMode,
    poison: bool,
    num_experts: int = 5,
    intermediate: int = 11,
) -> list[tuple[Tensor, list[str]]]:
    def run(collective: ThreadCollective) -> tuple[Tensor, list[str]]:
        rank = collective.dp_rank
        sharding = RankSharding(moe_sharding, rank, len(counts))
        stage = build_stage(sharding, num_experts, intermediate)
        exchange = PaddedExchange(
            PaddingPlan.for_mode(mode, counts), collective.row_collective, poison
        )
        return stage(rank_rows(counts)[rank], exchange), collective.calls

    return run_ranks(len(counts), run)


COUNTS = [(3,), (2, 2), (5, 1), (0, 4), (3, 0, 0), (4, 1, 7), (10, 12, 12, 12), (0, 12, 1, 0)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("moe_sharding", ["ep", "tp"])
def test_every_layout_equals_the_dense_loop(counts: tuple[int, ...], moe_sharding: str) -> None:
    expected = [dense(rows, 5, 11) for rows in rank_rows(counts)]
    outputs = {
        (mode, poison): run_stage(counts, moe_sharding, mode, poison)
        for mode, poison in itertools.product(BOTH, (False, True))
    }
    for results in outputs.values():
        for (out, calls), reference in zip(results, expected):
            assert calls == ["gather", "reduce_scatter"]
            torch.testing.assert_close(out.double(), reference, atol=2e-5, rtol=2e-5)
    first = outputs[PaddingMode.MAX_LEN, False]
    for results in outputs.values():
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(results, first)), "bit-equal"


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_nothing_moves_when_all_ranks_are_empty(dp_size: int) -> None:
    for mode in BOTH:
        for out, calls in run_stage((0,) * dp_size, "ep", mode, poison=True):
            assert out.shape == (0, HIDDEN)
            assert calls == []


@pytest.mark.parametrize(("moe_sharding", "num_experts", "intermediate"),
                         [("ep", 2, 16), ("tp", 3, 2)])  # fmt: skip
def test_ranks_without_any_expert_still_join(
    moe_sharding: str, num_experts: int, intermediate: int
) -> None:
    counts = (2, 3, 1, 4)
    expected = [dense(rows, num_experts, intermediate) for rows in rank_rows(counts)]
    results = run_stage(counts, moe_sharding, BOTH[0], True, num_experts, intermediate)
    for (out, calls), reference in zip(results, expected):
        assert calls == ["gather", "reduce_scatter"]
        torch.testing.assert_close(out.double(), reference, atol=2e-5, rtol=2e-5)


def test_rows_without_real_content_are_zero_where_a_bucket_is_larger() -> None:
    """Gathered rows beyond every rank's real ones, as a graph's bucket has them."""
    rows = rank_rows((3,))[0]

    def run(collective: ThreadCollective, real: int) -> Tensor:
        stage = build_stage(RankSharding("ep", 0, 1), 5, 11)
        exchange = PaddedExchange(PaddingPlan((real,), (8,)), collective.row_collective, True)
        return stage(rows[:real], exchange)

    out = run_ranks(1, lambda c: run(c, 3))[0]
    torch.testing.assert_close(out.double(), dense(rows, 5, 11), atol=2e-5, rtol=2e-5)
    assert run_ranks(1, lambda c: run(c, 0))[0].shape == (0, HIDDEN)


def test_without_renormalisation() -> None:
    rows = rank_rows((6,))[0]
    stage = build_stage(RankSharding("ep", 0, 1), 5, 11, renormalize=False)
    weights, ids = stage.router(rows)
    torch.testing.assert_close(
        stage.experts(rows, ids, weights).double(), dense(rows, 5, 11, False), atol=2e-5, rtol=2e-5
    )
    assert (weights.sum(-1) < 0.999).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_in_other_dtypes(dtype: torch.dtype) -> None:
    weights = LargeWeights(0, torch.device("cpu"), dtype)
    experts = Experts.load(
        weights, "experts", NAMES, ExpertShape(5, HIDDEN, 11), RankSharding("ep", 0, 1).shard(5, 11)
    )
    rows = rank_rows((9,))[0].to(dtype)
    ids = torch.tensor([[0, 4]] * 9)
    out = experts(rows, ids, torch.full((9, 2), 0.5))
    wide = Experts(experts.gate_up.float(), experts.down.float(), 0)
    expected = wide(rows.float(), ids, torch.full((9, 2), 0.5))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("moe_sharding", ["ep", "tp"])
@pytest.mark.parametrize(("num_experts", "intermediate"), [(8, 16), (7, 5), (2, 3), (1, 1)])
def test_shards_cover_everything_once_in_balance(
    moe_sharding: str, num_experts: int, intermediate: int
) -> None:
    for dp_size in range(1, 10):
        shards = [
            RankSharding(moe_sharding, rank, dp_size).shard(num_experts, intermediate)
            for rank in range(dp_size)
        ]
        pairs = [(e, i) for shard in shards for e in shard.experts for i in shard.intermediate]
        assert sorted(pairs) == list(itertools.product(range(num_experts), range(intermediate)))
        split = [len(s.experts if moe_sharding == "ep" else s.intermediate) for s in shards]
        assert max(split) - min(split) <= 1


def test_an_unknown_sharding_is_an_error() -> None:
    with pytest.raises(ValueError, match="moe_sharding: 'pp' is not allowed; ep or tp"):
        RankSharding("pp", 0, 1).shard(8, 8)

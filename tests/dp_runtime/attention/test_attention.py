"""The torch reference against plain dense attention; every unused slot of the pool holds NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dp_runtime.attention.kv_writer import KvWriter
from dp_runtime.attention.query_groups import group_pieces, split_queries
from dp_runtime.attention.registry import backend_class, choose_backend
from dp_runtime.attention.torch_ref import QueryPlan, TorchRefBackend
from dp_runtime.core.attention_metadata import AttentionMetadata
from dp_runtime.core.batch import LocalBatch
from dp_runtime.errors import ContractViolation
from tests.dp_runtime.paged import CPU, attend, metadata_of, paged_batch, random_page_table, spec_of

HEAD_DIM = 8


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [rows, heads, dim] are the last rows of k, v [seq, kv_heads, dim]; float64, row by row."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        seen = k.shape[0] - q.shape[0] + row + 1
        for head in range(q.shape[1]):
            keys, values = k[:seen, head // group], v[:seen, head // group]
            scores = keys @ q[row, head] / q.shape[2] ** 0.5
            out[row, head] = scores.softmax(0) @ values
    return out


class Case:
    """One random call: the backend's result and the dense one."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        page_size: int,
        heads: tuple[int, int] = (4, 2),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

        def rows(count: int, num_heads: int) -> Tensor:
            return torch.randn(count, num_heads, HEAD_DIM, generator=generator).to(dtype)

        table, num_pages = random_page_table([s for _, s in lengths], page_size, rng)
        self.pool = torch.full((num_pages, 2, heads[1], page_size, HEAD_DIM), torch.nan).to(dtype)
        keys = [rows(s, heads[1]) for _, s in lengths]
        values = [rows(s, heads[1]) for _, s in lengths]
        for request, (query_len, seq_len) in enumerate(lengths):
            for position in range(seq_len - query_len):
                page, offset = table[request, position // page_size], position % page_size
                self.pool[page, 0, :, offset] = keys[request][position]
                self.pool[page, 1, :, offset] = values[request][position]
        self.q = rows(sum(q for q, _ in lengths), heads[0])
        self.k = torch.cat([k[s - q :] for k, (q, s) in zip(keys, lengths)])
        self.v = torch.cat([v[s - q :] for v, (q, s) in zip(values, lengths)])
        batch = paged_batch(lengths, table, page_size)
        self.metadata = metadata_of(batch, num_pages, page_size)
        self.backend = TorchRefBackend(spec_of(self.pool, heads[0]), [self.pool])
        queries = self.q.split([q for q, _ in lengths])
        self.expected = torch.cat([dense_attention(*x) for x in zip(queries, keys, values)])

    def check(self, tolerance: float = 1e-5) -> None:
        out = attend(self.backend, self.q, self.k, self.v, self.metadata)
        assert out.dtype == self.q.dtype
        torch.testing.assert_close(out.double(), self.expected, atol=tolerance, rtol=tolerance)


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Decodes, verifications and prefill chunks, mixed."""
    query = st.one_of(st.just(1), st.integers(2, 5), st.integers(1, 80))
    history = st.one_of(st.just(0), st.integers(0, 120))
    pairs = draw(st.lists(st.tuples(query, history), min_size=1, max_size=6))
    return [(q, q + h) for q, h in pairs]


@settings(max_examples=40, deadline=None)
@given(
    batches(),
    st.sampled_from([1, 3, 8, 64]),
    st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    st.integers(0, 2**31),
)
def test_equals_dense_attention(
    lengths: list[tuple[int, int]], page_size: int, heads: tuple[int, int], seed: int
) -> None:
    Case(lengths, page_size, heads, seed=seed).check()


@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 200), (1, 1), (1, 64), (1, 65), (1, 128)],
        [(7, 7), (1, 30), (4, 34), (4, 90), (20, 100), (1, 2)],
        [(300, 300), (1, 9)],
        [(270, 290), (270, 280)],
    ],
    ids=["decode", "mixed", "long prefill", "long chunks"],
)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_kinds_of_batches(lengths: list[tuple[int, int]], page_size: int) -> None:
    Case(lengths, page_size).check()


def test_bfloat16_is_computed_in_float32() -> None:
    case = Case([(1, 150), (5, 40), (90, 90)], 16, dtype=torch.bfloat16)
    out = attend(case.backend, case.q, case.k, case.v, case.metadata)
    assert (
        torch.equal(out, case.expected.to(torch.bfloat16))
        or ((out.double() - case.expected).abs() <= case.expected.abs() * 2**-8 + 1e-6).all()
    )


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    alone = Case([(1, 77)], 8)
    together = Case([(1, 77), (1, 80), (1, 3), (9, 50)], 8)
    pool_free = attend(together.backend, together.q, together.k, together.v, together.metadata)[:1]
    torch.testing.assert_close(pool_free.double(), together.expected[:1], atol=1e-5, rtol=1e-5)
    alone.check()


def test_zero_rows_touch_nothing() -> None:
    pool = torch.full((3, 2, 2, 4, HEAD_DIM), torch.nan)
    metadata = metadata_of(LocalBatch.empty(), 3, 4)
    backend = TorchRefBackend(spec_of(pool, 4), [pool])
    empty = torch.zeros(0, 2, HEAD_DIM)
    out = attend(backend, torch.zeros(0, 4, HEAD_DIM), empty, empty, metadata)
    assert out.shape == (0, 4, HEAD_DIM)
    assert pool.isnan().all()


def test_appends_at_slot_mapping_only() -> None:
    case = Case([(3, 10), (1, 5)], 4)
    before = case.pool.clone()
    attend(case.backend, case.q, case.k, case.v, case.metadata)
    slots = case.metadata.slot_mapping
    flat = case.pool.permute(0, 3, 1, 2, 4).flatten(0, 1)  # [slots, 2, kv_heads, head_dim]
    assert torch.equal(flat[slots, 0], case.k)
    assert torch.equal(flat[slots, 1], case.v)
    untouched = torch.ones(flat.shape[0], dtype=torch.bool)
    untouched[slots] = False
    old = before.permute(0, 3, 1, 2, 4).flatten(0, 1)
    torch.testing.assert_close(flat[untouched], old[untouched], equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (lambda c: {"q": c.q[:-1]}, ("q shape", "(4, 4, 8)", "(5, 4, 8)")),
        (lambda c: {"q": c.q[:, :2]}, ("q shape", "(5, 2, 8)", "(5, 4, 8)")),
        (lambda c: {"k": c.k[1:]}, ("k shape", "(4, 2, 8)", "(5, 2, 8)")),
        (lambda c: {"v": c.v[..., :4]}, ("v shape", "(5, 2, 4)", "(5, 2, 8)")),
        (lambda c: {"q": c.q.half()}, ("q dtype", "float16", "float32")),
        (lambda c: {"k": c.k.bfloat16()}, ("k dtype", "bfloat16", "float32")),
        (
            lambda c: {"metadata": replace(c.metadata, seq_lens=c.metadata.seq_lens[:1])},
            ("seq_lens shape", "(1,)", "(2,)"),
        ),
        (
            lambda c: {"metadata": replace(c.metadata, page_table=c.metadata.page_table[:1])},
            ("page_table shape", "(1, 3)", "(2, 3)"),
        ),
    ],
)  # fmt: skip
def test_contract_violations_name_layer_and_both_numbers(
    change: Callable[[Case], dict[str, Any]], numbers: tuple[str, ...]
) -> None:
    case = Case([(4, 9), (1, 5)], 4)
    pool, paged = case.pool.clone(), case.backend.layer(0)

    def call(
        k: Tensor = case.k,
        v: Tensor = case.v,
        q: Tensor | None = None,
        metadata: AttentionMetadata = case.metadata,
    ) -> None:
        plan = case.backend.plan(metadata)
        if q is not None:
            paged.run(q, plan)
        KvWriter(paged.cache).append(k, v, plan)

    with pytest.raises(ContractViolation, match=r"layers? 0(\.\.0)?: ") as caught:
        call(**change(case))
    assert all(number in str(caught.value) for number in numbers)
    torch.testing.assert_close(case.pool, pool, equal_nan=True, atol=0, rtol=0)


def test_layers_share_the_groups_of_one_plan() -> None:
    case, other = Case([(1, 9)], 4), Case([(1, 9), (2, 3)], 4)
    plan, another = case.backend.plan(case.metadata), case.backend.plan(other.metadata)
    assert isinstance(plan, QueryPlan)
    assert isinstance(another, QueryPlan)
    assert (len(plan.groups), len(another.groups)) == (1, 2)
    with pytest.raises(ContractViolation, match=r"layer 0: q shape is \(3, 4, 8\), .*\(1, 4, 8\)"):
        case.backend.layer(0).run(other.q, plan)
    paged = case.backend.layer(0)
    KvWriter(paged.cache).append(case.k, case.v, plan)
    torch.testing.assert_close(paged.run(case.q, plan).double(), case.expected, atol=1e-5, rtol=0)


def test_groups_cover_every_row_once_and_bound_their_padding() -> None:
    lengths = [(1, n) for n in range(1, 200, 7)] + [(600, 600), (4, 8), (4, 2000), (300, 900)]
    table, num_pages = random_page_table([s for _, s in lengths], 16, np.random.default_rng(0))
    metadata = metadata_of(paged_batch(lengths, table, 16), num_pages, 16)
    groups = group_pieces(split_queries(metadata), 16)
    rows = [r for g in groups for p in g for r in range(p.first_row, p.first_row + p.query_len)]
    assert sorted(rows) == list(range(metadata.num_tokens))
    for group in groups:
        kv_lens = [piece.kv_len for piece in group]
        assert max(kv_lens) < 2 * min(kv_lens) + 16


def test_choice_of_a_backend_without_a_gpu() -> None:
    spec = spec_of(torch.zeros(2, 2, 2, 16, 64), 4)
    assert choose_backend("auto", spec, CPU)[0] == "torch_ref"
    assert choose_backend("torch_ref", spec, CPU)[0] == "torch_ref"
    with pytest.raises(ValueError, match="attention_backend: 'trtllm' is not allowed; auto or"):
        choose_backend("trtllm", spec, CPU)
    with pytest.raises(ValueError, match="attention_backend: 'nope' is not allowed; one of torch"):
        backend_class("nope")

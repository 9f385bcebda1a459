"""GPU attention backends against the float32 torch reference, over the same paged cache."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_runtime.attention import make_backend
from dp_runtime.batch import LocalBatch
from dp_runtime.errors import ContractViolation
from dp_runtime.metadata import AttentionMetadata, PageGeometry, Place
from tests.dp_runtime.paged import paged_batch, random_page_table

CUDA = torch.device("cuda")
PLACE = Place(0, 3, "target")
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int


QWEN3 = Heads(32, 4, 128)
QWEN35 = Heads(32, 2, 256)
QWEN35_LARGE = Heads(16, 2, 256)


@dataclass(frozen=True, eq=False)
class Case:
    """A batch of (query_len, seq_len) over a random cache."""

    heads: Heads
    page_size: int
    dtype: torch.dtype
    batch: LocalBatch
    num_pages: int
    pool: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def make(
        cls, lengths: list[tuple[int, int]], heads: Heads, page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "Case":  # fmt: skip
        rng = np.random.default_rng(len(lengths))
        table, num_pages = random_page_table([s for _, s in lengths], page_size, rng)
        batch = paged_batch(lengths, table, page_size)
        torch.manual_seed(0)
        shape = (num_pages, 2, heads.num_kv_heads, page_size, heads.head_dim)
        pool = torch.randn(shape, dtype=dtype, device=CUDA)
        pool[0] = 0
        rows = batch.num_tokens

        def random_rows(count: int) -> Tensor:
            return torch.randn((rows, count, heads.head_dim), dtype=dtype, device=CUDA)

        kv_heads = heads.num_kv_heads
        q, k, v = random_rows(heads.num_heads), random_rows(kv_heads), random_rows(kv_heads)
        return cls(heads, page_size, dtype, batch, num_pages, pool, q, k, v)

    @property
    def metadata(self) -> AttentionMetadata:
        pages = PageGeometry(self.num_pages, self.page_size)
        return AttentionMetadata.build(self.batch, pages, PLACE, CUDA)

    def run(self, name: str) -> Tensor:
        backend = make_backend(name, [self.pool.clone()], self.heads.num_heads)(0)
        return backend(self.q, self.k, self.v, self.metadata)

    def reference(self) -> Tensor:
        backend = make_backend("torch_ref", [self.pool.float()], self.heads.num_heads)(0)
        return backend(self.q.float(), self.k.float(), self.v.float(), self.metadata)


def relative_error(found: Tensor, due: Tensor) -> float:
    return float((found.float() - due).norm() / due.norm())


def lengths_of(batch: int, query_len: int, longest: int) -> list[tuple[int, int]]:
    """Sequence lengths with page boundaries and their neighbours, up to `longest`."""
    edges = [1, 2, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1000, 2047, 2048, 4097, 8191, 8192]
    fitting = [edge for edge in edges if query_len <= edge <= longest] or [query_len]
    return [(query_len, fitting[i % len(fitting)]) for i in range(batch)]


DECODES = [(batch, 8192 if batch <= 64 else 2048) for batch in (1, 10, 12, 64, 256)]
PREFILLS = {
    "whole": [(1, 1), (63, 63), (64, 64), (65, 65), (513, 513), (2048, 2048)],
    "chunk": [(64, 100), (512, 2048), (512, 8192), (17, 4097), (65, 129)],
    "long": [(8192, 8192)],
    "ten": lengths_of(10, 40, 4097),
    "many": lengths_of(64, 9, 1000),
}


@pytest.mark.parametrize("name", ["trtllm", "flashinfer"])
@pytest.mark.parametrize(
    "heads", [QWEN3, QWEN35_LARGE, QWEN35], ids=["d128r8", "d256r8", "d256r16"]
)
@pytest.mark.parametrize(("batch", "longest"), DECODES)
def test_decode(name: str, heads: Heads, batch: int, longest: int) -> None:
    case = Case.make(lengths_of(batch, 1, longest), heads)
    assert relative_error(case.run(name), case.reference()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ["trtllm", "flashinfer"])
@pytest.mark.parametrize(
    "heads", [QWEN3, QWEN35_LARGE, QWEN35], ids=["d128r8", "d256r8", "d256r16"]
)
@pytest.mark.parametrize("kind", list(PREFILLS))
def test_prefill_and_chunks(name: str, heads: Heads, kind: str) -> None:
    case = Case.make(PREFILLS[kind], heads)
    assert relative_error(case.run(name), case.reference()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ["trtllm", "flashinfer"])
def test_decodes_and_chunks_in_any_order_share_a_slot(name: str) -> None:
    lengths = [(1, 70), (30, 30), (1, 1), (5, 69), (1, 500), (200, 700), (1, 64)]
    case = Case.make(lengths, QWEN3)
    assert relative_error(case.run(name), case.reference()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ["trtllm", "flashinfer"])
def test_zero_rows_call_no_kernel(name: str) -> None:
    case = Case.make([(1, 9)], QWEN3)
    backend = make_backend(name, [case.pool], case.heads.num_heads)(0)
    pages = PageGeometry(case.num_pages, case.page_size)
    metadata = AttentionMetadata.build(LocalBatch.empty(), pages, PLACE, CUDA)
    assert backend(case.q[:0], case.k[:0], case.v[:0], metadata).shape == (0, 32, 128)


@pytest.mark.parametrize("name", ["trtllm", "flashinfer"])
def test_rows_beyond_the_metadata_are_refused(name: str) -> None:
    """The call of SGLang PR #21649: 12 query rows, metadata of 10."""
    case, padded = (Case.make(lengths_of(n, 1, 1000), QWEN3) for n in (10, 12))
    backend = make_backend(name, [case.pool], case.heads.num_heads)(0)
    with pytest.raises(ContractViolation) as error:
        backend(padded.q, padded.k, padded.v, case.metadata)
    text = str(error.value)
    assert "rank 0, step 3, slot target, layer 0: q shape is (12, 32, 128)" in text
    assert "(10, 32, 128)" in text


@pytest.mark.parametrize("name", ["trtllm", "flashinfer"])
def test_pages_of_others_do_not_reach_a_result(name: str) -> None:
    case = Case.make([(1, 70), (30, 100)], QWEN3)
    clean = case.run(name)
    used = {int(page) for row in case.batch.page_table for page in row}
    for page in set(range(1, case.num_pages)) - used:
        case.pool[page] = float("nan")
    assert torch.equal(case.run(name), clean)

"""Which kernel serves a group of a pass, in Triton's interpreter and in plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.attention.trtllm.split import SplitCalls
from dp_runtime.kernels.split_tile import SplitTile
from tests.dp_runtime.fake_kernels import FakeKernels
from tests.dp_runtime.paged import attend, metadata_of, paged_batch, random_page_table

PAGE, DIM = 16, 16
LENGTHS = [(1, 20), (3, 40), (1, 3), (30, 30), (3, 3)]  # decodes among verifications and a prompt


def test_groups_that_get_a_tile_attend_as_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(query_len: int, requests: int) -> SplitTile | None:
        asked.append((query_len, requests))
        return SplitTile(16, num_stages=2) if query_len == 3 else None

    spec = AttentionSpec(4, 2, DIM, PAGE, torch.float32, torch.float32, frozenset({1, 3}))
    table, num_pages = random_page_table([n for _, n in LENGTHS], PAGE, np.random.default_rng(0))
    metadata = metadata_of(paged_batch(LENGTHS, table, PAGE), num_pages, PAGE)
    torch.manual_seed(0)
    pool = torch.randn(num_pages, 2, 2, PAGE, DIM)
    q, k, v = (torch.randn(metadata.num_tokens, n, DIM) for n in (4, 2, 2))
    kernels = FakeKernels()
    due = attend(TrtllmBackend(spec, [pool.clone()], calls=kernels), q, k, v, metadata)
    decoded = list[int | None]()
    decode = kernels.decode

    def spied(*call: object) -> None:
        decoded.append(call[3].query_len)  # type: ignore[attr-defined]
        decode(*call)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "decode", spied)
    calls = SplitCalls(kernels, DIM**-0.5, choose)
    found = attend(TrtllmBackend(spec, [pool.clone()], calls=calls), q, k, v, metadata)
    torch.testing.assert_close(found, due, atol=1e-5, rtol=1e-5)
    assert asked == [(1, 2), (3, 2)]
    assert decoded == [1]

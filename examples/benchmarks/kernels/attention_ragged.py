"""Verification of drafts of different lengths: by length, by the ragged XQA entry, or by FMHAv2.

    python -m examples.benchmarks.kernels.attention_ragged

64 requests with up to 2048 tokens in the cache, each with 2..8 query rows; one layer of the
Qwen3-30B-A3B shape, bf16, page 64. Eager, as the runtime calls it, and replayed in a CUDA graph.
Floor: the bytes of K and V that must be read, at 3.0 TB/s. Needs a GPU with XQA (SM90).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from torch import Tensor

from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.attention.trtllm.kernel_groups import KernelGroup, build_groups, causal_mask
from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry, Place
from dp_runtime.core.batch import Int32
from dp_runtime.kernels.jit_build import KernelBuilds
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.device_timing import captured, event_us
from examples.paged_batch import paged_batch

BF16 = torch.bfloat16
SPEC = AttentionSpec(32, 4, 128, 64, BF16, BF16, frozenset(range(2, 9)))
TB_PER_S = 3.0
SCALE = SPEC.head_dim**-0.5


@dataclass(frozen=True, eq=False)
class Load:
    """Requests with drafts of 2..8 tokens over a random cache."""

    metadata: AttentionMetadata
    pool: Tensor
    q: Tensor
    kv_bytes: int


def main() -> None:
    args = parse_args()
    device = torch.device("cuda", 0)
    print(machine.describe("torch", "flashinfer-python"), f"; {torch.cuda.get_device_name(device)}")
    build(device)
    load = make_load(args.requests, args.longest, device)
    floor_us = load.kv_bytes / TB_PER_S / 1e6
    print(f"{args.requests} requests, {len(load.q)} query rows; floor {floor_us:.1f} us")
    calls = {
        "XQA, grouped by length": by_length(load, SPEC),
        "XQA, ragged": ragged(load),
        "FMHAv2": by_length(load, replace(SPEC, decode_query_lens=frozenset())),
    }
    due = calls["FMHAv2"]().float()
    for name, call in calls.items():
        error = float((call().float() - due).norm() / due.norm())
        assert error < 1e-2, f"{name} differs from FMHAv2 by {error}"
        eager, replayed = median_us(call, args.calls), median_us(captured(call), args.calls)
        print(
            f"{name:<24} eager {eager:7.1f} us ({eager / floor_us:.1f}x the floor), in a graph "
            f"{replayed:7.1f} us ({replayed / floor_us:.1f}x)"
        )


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--calls", type=int, default=200)
    return parser.parse_args()


def build(device: torch.device) -> None:
    """FMHAv2 and XQA for each length; the ragged entry runs the module of the longest."""
    with KernelBuilds(TrtllmBackend.jit_modules(SPEC, device), device) as builds:
        builds.wait()


def make_load(requests: int, longest: int, device: torch.device) -> Load:
    rng = np.random.default_rng(0)
    query_lens = rng.integers(2, 9, requests).astype(np.int32)
    seq_lens = rng.integers(longest // 2, longest + 1, requests).astype(np.int32)
    return load_of(query_lens, seq_lens, device)


def load_of(
    query_lens: Int32, seq_lens: Int32, device: torch.device, spec: AttentionSpec = SPEC
) -> Load:
    """Requests of these lengths on pages at random."""
    requests, rng, size = len(query_lens), np.random.default_rng(0), spec.page_size
    used = -(-seq_lens // size)
    table = np.zeros((requests, int(used.max())), np.int32)
    pages = rng.permutation(np.arange(1, int(used.sum()) + 1, dtype=np.int32))
    for row, last in enumerate(np.cumsum(used)):
        table[row, : used[row]] = pages[last - used[row] : last]
    num_pages = len(pages) + 1
    batch = paged_batch(query_lens, seq_lens, table, size)
    place = Place(0, 0, "target")
    metadata = AttentionMetadata.build(batch, PageGeometry(num_pages, size), place, device)
    shape = (num_pages, 2, spec.num_kv_heads, size, spec.head_dim)
    pool = torch.randn(shape, dtype=BF16, device=device)
    q = torch.randn((batch.num_tokens, spec.num_heads, spec.head_dim), dtype=BF16, device=device)
    token_bytes = 2 * spec.num_kv_heads * spec.head_dim * BF16.itemsize
    return Load(metadata, pool, q, int(seq_lens.sum()) * token_bytes)


def by_length(load: Load, spec: AttentionSpec) -> Callable[[], Tensor]:
    """One call per query length, as the runtime does; FMHAv2 for all where none is for decode."""
    from dp_runtime.attention.trtllm.sm90 import make_calls

    calls, out, scales = make_calls(spec, load.q.device), torch.empty_like(load.q), KvScales()
    groups = build_groups(load.metadata, spec.decode_query_lens)

    def run_group(group: KernelGroup) -> None:
        rows = load.q[group.rows]
        target = torch.empty_like(rows)
        call = calls.decode if group.query_len else calls.prefill
        call(rows, load.pool, scales, group, target)
        out[group.rows] = target

    def call() -> Tensor:
        for group in groups:
            run_group(group)
        return out

    return call


def ragged(load: Load) -> Callable[[], Tensor]:
    """One call for all lengths; its mask has the rows of all requests, one after the other."""
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    metadata, device = load.metadata, load.q.device
    lengths = metadata.query_lens_host.tolist()
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
    rows = [causal_mask(1, length, torch.device("cpu"))[0].numpy() for length in lengths]
    mask = torch.from_numpy(np.concatenate(rows)).to(device)
    out = torch.empty_like(load.q)

    def call() -> Tensor:
        xqa_batch_decode_with_kv_cache(
            query=load.q,
            kv_cache=load.pool,
            workspace_buffer=workspace,
            block_tables=metadata.page_table,
            seq_lens=metadata.seq_lens,
            max_seq_len=int(metadata.seq_lens_host.max()),
            bmm1_scale=SCALE,
            bmm2_scale=1.0,
            out=out,
            kv_layout="HND",
            q_len_per_req=max(lengths),
            mask=mask,
            q_cu_seq_lens=metadata.cu_seqlens_q,
        )
        return out

    return call


def median_us(call: Callable[[], object], calls: int) -> float:
    """Median of single calls between CUDA events, after some that are not counted."""
    for _ in range(20):
        call()
    return median(event_us(call) for _ in range(calls))


if __name__ == "__main__":
    main()

"""Attention of decodes and of verifications: which kernel reads the cache fastest, shape by shape.

    python -m examples.benchmarks.attention_decode [--query-lens 1 4] [--requests 16 64] [--uneven]

One layer of the Qwen3-30B-A3B shape (32 query heads, 4 KV heads of 128), bf16, page 64, --context
tokens of every request in the cache (--uneven: log-uniform 128..4096), four layers' pools in turn
in a CUDA graph. Candidates: XQA as the runtime calls it, FMHAv2, flashinfer's FA2 and FA3 by its
prefill wrapper, and our own kernel over chunks of keys with several tiles, of which the best is
named. Each is compared with XQA. Floor: the bytes of keys and values at the measured rate. What
does not build or run is named and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from dp_runtime.attention.contract import offsets
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.attention.trtllm.kernel_groups import build_groups
from dp_runtime.kernels.jit_build import KernelBuilds
from dp_runtime.kernels.split_attention import SplitTile, split_attention
from examples.benchmarks.attention_ragged import BF16, SCALE, Load, load_of
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.device_timing import describe_gpu, graph_us, read_rate

LAYERS = 4
ALLOWED_ERROR = 1e-2
WORKSPACE_BYTES = 256 << 20
Call = Callable[[int], Tensor]  # of a layer


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--query-lens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--context", type=int, default=1152)
    parser.add_argument("--uneven", action="store_true")
    args = parser.parse_args()
    device, rate = torch.device("cuda", 0), read_rate()
    print(machine.describe("torch", "triton", "flashinfer-python"), describe_gpu(), sep="\n")
    spec = AttentionSpec(32, 4, 128, 64, BF16, BF16, frozenset(args.query_lens))
    with KernelBuilds(TrtllmBackend.jit_modules(spec, device), device) as builds:
        builds.wait()
    rng = np.random.default_rng(0)
    for query_len, requests in product(args.query_lens, args.requests):
        lengths = np.full(requests, args.context, np.int32)
        if args.uneven:
            lengths = np.exp(rng.uniform(np.log(128), np.log(4096), requests)).astype(np.int32)
        load = load_of(np.full(requests, query_len, np.int32), lengths, device)
        compare(load, spec, query_len, load.kv_bytes / rate * 1e6)


def compare(load: Load, spec: AttentionSpec, query_len: int, floor_us: float) -> None:
    requests = len(load.metadata.query_lens_host)
    print(f"{requests} requests of {query_len} rows; floor {floor_us:.1f} us", flush=True)
    due, found = None, dict[str, float]()
    for name, make in candidates(load, spec, query_len):
        try:
            call = make()
            rows = call(0).float()
            due = rows.clone() if due is None else due
            error = float((rows - due).norm() / due.norm())
            assert error < ALLOWED_ERROR, f"differs from XQA by {error:.3g}"
            found[name] = graph_us(call, LAYERS)
        except Exception as error:
            print(f"  {name} is out: {type(error).__name__}: {str(error)[:120]}", flush=True)
            torch.cuda.synchronize()
    splits = sorted((us, name) for name, us in found.items() if name.startswith("split"))
    shown = [(us, name) for name, us in found.items() if not name.startswith("split")]
    for us, name in (*shown, *splits[:2]):
        rate = load.kv_bytes / us / 1e6
        print(f"  {us:7.1f} us  {us / floor_us:5.2f} x floor  {rate:5.2f} TB/s  {name}", flush=True)


def candidates(
    load: Load, spec: AttentionSpec, query_len: int
) -> Iterator[tuple[str, Callable[[], Call]]]:
    pools, out = [load.pool] + [load.pool.clone() for _ in range(LAYERS - 1)], load.q.clone()
    own = load, spec, pools, out
    yield "XQA", partial(by_trtllm, *own, decode=True)
    yield "FMHAv2", partial(by_trtllm, *own, decode=False)
    for name in ("fa2", "fa3"):
        yield f"flashinfer {name}", partial(by_flashinfer, *own, name)
    for chunk, warps, stages, programs in product((128, 256, 512), (4, 8), (2, 3, 5), (2, 3, 4)):
        tile = SplitTile(chunk, warps, stages, programs)
        yield f"split: {tile}", partial(by_split, load, pools, out, tile)


def by_trtllm(
    load: Load, spec: AttentionSpec, pools: list[Tensor], out: Tensor, decode: bool
) -> Call:
    from dp_runtime.attention.trtllm.sm90 import make_calls

    calls, scales = make_calls(spec, load.q.device), KvScales()
    lengths = spec.decode_query_lens if decode else frozenset[int]()
    (group,) = build_groups(load.metadata, lengths)

    def call(layer: int) -> Tensor:
        (calls.decode if decode else calls.prefill)(load.q, pools[layer], scales, group, out)
        return out

    return call


def by_flashinfer(
    load: Load, spec: AttentionSpec, pools: list[Tensor], out: Tensor, backend: str
) -> Call:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    metadata, size = load.metadata, spec.page_size
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=load.q.device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=backend)
    counts = -(-metadata.seq_lens_host // size)
    used = np.arange(metadata.page_table_host.shape[1]) < counts[:, None]
    last = (metadata.seq_lens_host - (counts - 1) * size).astype(np.int32)
    arrays = (offsets(counts.astype(np.int32)), metadata.page_table_host[used], last)
    wrapper.plan(
        metadata.cu_seqlens_q,
        *(torch.from_numpy(array).to(load.q.device) for array in arrays),
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        size,
        causal=True,
        q_data_type=spec.dtype,
        kv_data_type=spec.kv_dtype,
    )

    def call(layer: int) -> Tensor:
        wrapper.run(load.q, pools[layer], out=out)
        return out

    return call


def by_split(load: Load, pools: list[Tensor], out: Tensor, tile: SplitTile) -> Call:
    metadata = load.metadata
    longest = int(metadata.seq_lens_host.max())

    def call(layer: int) -> Tensor:
        table, lengths = metadata.page_table, metadata.seq_lens
        split_attention(load.q, pools[layer], table, lengths, longest, SCALE, out, tile)
        return out

    return call


if __name__ == "__main__":
    main()

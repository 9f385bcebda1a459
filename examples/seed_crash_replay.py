"""The crash this project comes from (SGLang PR #21649), and why it can not happen here.

    python -m examples.seed_crash_replay [--runs 10] [--dp-size 4] [--model DIR] [--shape NAME]

On a GPU, a child process makes the decode call as the buggy code did: 12 query rows, metadata of
10, and behind row 10 of the same allocations rows whose pages lie outside the pool. The kernel
takes its batch size from the query and walks into them; the CUDA context dies with an illegal
address. A control child with metadata for 12 rows is clean. Then, with or without a GPU, the
runtime's contract refuses the same call, and the runtime serves 10, 12, 12 and 12 requests on four
ranks, each attending to its own, with token counts as computed beforehand. With fewer GPUs than
ranks, ranks share them. The exit status is 1 if the crash did not show as described.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.attention.registry import backend_class
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry, Place
from dp_runtime.core.batch import LocalBatch
from dp_runtime.errors import ContractViolation
from examples.paged_batch import paged_batch

TINY_MODEL = Path(__file__).parent / "tiny_moe" / "checkpoint"
REAL, PADDED = 10, 12
LOADS = (10, 12, 12, 12)
PAGE, PAGES_EACH = 64, 16
NUM_PAGES = REAL * PAGES_EACH + 1


class Heads(NamedTuple):
    q: int
    kv: int
    dim: int


SHAPES = {"qwen3-30b-a3b": Heads(32, 4, 128), "qwen3.5-397b-a17b": Heads(32, 2, 256)}


def main() -> int:
    options = _options()
    if options.child:
        return call_as_the_buggy_code(SHAPES[options.shape], control=options.child == "control")
    shown = show_the_crash(options.runs, options.shape)
    print(f"the contract on the same call: {refuse_the_call(SHAPES[options.shape])}")
    print(serve_the_load(options))
    return 0 if shown else 1


def show_the_crash(runs: int, shape: str) -> bool:
    """Whether every child with the bad call died of it, and the control did not."""
    if not torch.cuda.is_available():
        print("no GPU: the crash itself is not shown")
        return True
    died = sum(child_dies("bad", shape) for _ in range(runs))
    control = child_dies("control", shape)
    print(f"12 query rows over metadata of 10: {died} of {runs} children died")
    print(f"control, metadata for 12: {'died' if control else 'clean'}")
    return died == runs and not control


def child_dies(kind: str, shape: str) -> bool:
    """Run the call in a process of its own, for the CUDA context does not survive it."""
    command = [
        sys.executable,
        "-m",
        "examples.seed_crash_replay",
        "--child",
        kind,
        "--shape",
        shape,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "CUDA error" in line]
    print(f"  {kind}: exit {done.returncode}; {done.stdout.strip()} {said[0] if said else ''}")
    assert done.returncode in (0, 3), done.stderr
    return done.returncode == 3


def call_as_the_buggy_code(heads: Heads, control: bool) -> int:
    """The decode call with 12 query rows; exit status 3 if the device died of it."""
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    device = torch.device("cuda")
    pool = torch.randn(
        (NUM_PAGES, 2, heads.kv, PAGE, heads.dim), dtype=torch.bfloat16, device=device
    )
    tables = torch.full((PADDED, PAGES_EACH), 2_000_000_000, dtype=torch.int32, device=device)
    lengths = torch.full((PADDED,), PAGES_EACH * PAGE, dtype=torch.int32, device=device)
    tables[:REAL] = torch.arange(1, NUM_PAGES, device=device).view(REAL, PAGES_EACH)
    if control:
        tables[REAL:] = tables[: PADDED - REAL]
    rows = PADDED if control else REAL
    page_table, seq_lens = tables[:rows], lengths[:rows]
    if not control:  # what the kernel will read lies behind row 10 of these very allocations
        behind = page_table.data_ptr() + REAL * PAGES_EACH * page_table.element_size()
        assert behind == tables[REAL:].data_ptr(), "the guard rows follow row 10"
        assert bool((tables[REAL:] >= NUM_PAGES).all()), "the guard rows are poisoned"
    print(f"page_table has {len(page_table)} rows, q {PADDED}:", end=" ")
    trtllm_batch_decode_with_kv_cache(
        query=torch.randn((PADDED, heads.q, heads.dim), dtype=torch.bfloat16, device=device),
        kv_cache=pool,
        workspace_buffer=torch.zeros(128 << 20, dtype=torch.uint8, device=device),
        block_tables=page_table,
        seq_lens=seq_lens,
        max_seq_len=PAGES_EACH * PAGE,
        bmm1_scale=heads.dim**-0.5,
        kv_layout="HND",
        backend="xqa",
    )
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(str(error).splitlines()[0], flush=True)
        if "illegal memory access" not in str(error):
            raise
        return 3
    print("no error", flush=True)
    return 0


def refuse_the_call(heads: Heads) -> str:
    """The runtime's answer to 12 query rows over metadata of 10 requests."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pool = torch.zeros((NUM_PAGES, 2, heads.kv, PAGE, heads.dim), dtype=torch.bfloat16).to(device)
    spec = AttentionSpec(heads.q, heads.kv, heads.dim, PAGE, pool.dtype, pool.dtype)
    name = "trtllm" if device.type == "cuda" else "torch_ref"
    backend = backend_class(name)(spec, [pool])
    metadata = AttentionMetadata.build(
        _decode_batch(), PageGeometry(NUM_PAGES, PAGE), Place(0, 0, "target"), device
    )
    q = torch.zeros((PADDED, heads.q, heads.dim), dtype=torch.bfloat16, device=device)
    plan = backend.plan(metadata)
    try:
        backend.layer(0).run(q, plan)
    except ContractViolation as error:
        return str(error)
    raise AssertionError("12 query rows over metadata of 10 were accepted")


def _decode_batch() -> LocalBatch:
    """Ten requests that decode their last token."""
    length = PAGES_EACH * PAGE
    page_table = np.arange(1, NUM_PAGES, dtype=np.int32).reshape(REAL, PAGES_EACH)
    lengths = np.ones(REAL, np.int32), np.full(REAL, length, np.int32)
    return paged_batch(*lengths, page_table, PAGE)


def serve_the_load(options: argparse.Namespace) -> str:
    """10, 12, 12, 12 requests pinned to their ranks; every one gets its own number of tokens."""
    loads = LOADS[: options.dp_size]
    ranks = [rank for rank, count in enumerate(loads) for _ in range(count)]
    due = [5 + index % 7 for index in range(len(ranks))]
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in due]
    num_gpus = torch.cuda.device_count()
    config = EngineConfig(
        str(options.model), dp_size=options.dp_size, launcher=options.launcher,
        ranks_per_gpu=-(-options.dp_size // num_gpus) if num_gpus else 1,
        max_model_len=256, poison_padding=True,
    )  # fmt: skip
    with Engine(config) as engine:
        vocab = engine.model.vocab_size
        prompts = [[(i * 13 + at) % vocab for at in range(3 + i)] for i in range(len(due))]
        outputs = engine.generate(prompts, params, dp_ranks=ranks)
        report = engine.report()
    assert [len(output.token_ids) for output in outputs] == due, "a request's tokens are missing"
    assert [output.dp_rank for output in outputs] == ranks, "a request ran on another rank"
    return f"served {loads} requests on {len(loads)} ranks, padding poisoned:\n{report}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=10, help="children that make the bad call")
    parser.add_argument("--dp-size", type=int, default=4, choices=(1, 2, 3, 4))
    parser.add_argument("--model", type=Path, default=TINY_MODEL)
    parser.add_argument("--launcher", default="local", choices=("local", "ray"))
    text = "model whose attention the call has"
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=SHAPES, help=text)
    parser.add_argument("--child", choices=("bad", "control"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

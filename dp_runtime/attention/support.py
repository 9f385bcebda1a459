"""The limits of flashinfer's kernels, as ValueErrors at start: the kernels crash or are wrong.

Read in the sources of flashinfer 0.7.2; the file is named at each limit.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.core.e4m3 import E4M3
from dp_runtime.errors import require

HALVES = (torch.bfloat16, torch.float16)
# XQA: flashinfer/jit/xqa.py, gen_xqa_module. FMHAv2: page and KV tile (64, 128 or 256 tokens) must
# divide one another: csrc/fmha_v2/fmha/warpspec/dma.h.
TRTLLM_PAGE_SIZES = (16, 32, 64, 128)
# Not padded by csrc/xqa/mha.h (headElems), nor by jit/attention/fmha_v2/fmha_library.py.
TRTLLM_HEAD_DIMS = (64, 128, 256)
MAX_GROUP_SIZE = 32  # rows of a tile, which are the query heads of a KV head: csrc/xqa/mha.cu
MAX_DECODE_QUERY_LEN = 8
# With an e4m3 cache a verification puts 64 / group_size tokens into a tile: csrc/xqa/mha_sm90.cu.
QUANTIZED_GROUP_SIZES = (1, 2, 4, 8, 16, 32)
NATIVE_HEAD_DIMS = (64, 128, 256)  # include/flashinfer/utils.cuh, DISPATCH_HEAD_DIM
NOT_INSTALLED = "flashinfer is not installed: pip install 'dp-runtime[gpu]'"


def has_flashinfer() -> bool:
    return find_spec("flashinfer") is not None


def check_flashinfer(name: str) -> None:
    require(has_flashinfer(), "attention_backend", name, f"{NOT_INSTALLED}, or use torch_ref")


def check_trtllm(spec: AttentionSpec, major: int) -> None:  # major: of the compute capability
    """Raise ValueError for a spec that FMHAv2 and XQA, or trtllm-gen, do not serve."""
    one_of(
        "attention_backend", "trtllm", major in (9, 10),
        f"compute capability 9 or 10 (this device has {major})", "flashinfer",
    )  # fmt: skip
    check_dtypes(spec, "torch_ref")
    page, dim, ratio = spec.page_size, spec.head_dim, spec.group_size
    one_of("page_size", page, page in TRTLLM_PAGE_SIZES, _listed(TRTLLM_PAGE_SIZES), "flashinfer")
    one_of("head_dim", dim, dim in TRTLLM_HEAD_DIMS, _listed(TRTLLM_HEAD_DIMS), "torch_ref")
    ok = spec.num_heads % spec.num_kv_heads == 0 and ratio <= MAX_GROUP_SIZE
    what = f"a multiple of num_kv_heads {spec.num_kv_heads}, at most {MAX_GROUP_SIZE} times it"
    one_of("num_heads", spec.num_heads, ok, what, "flashinfer")
    lens = sorted(spec.decode_query_lens)
    ok = all(1 <= length <= MAX_DECODE_QUERY_LEN for length in lens)
    one_of("decode_query_lens", lens, ok, f"1..{MAX_DECODE_QUERY_LEN}", "flashinfer")
    if spec.quantized and lens[-1] > 1:
        ok = ratio in QUANTIZED_GROUP_SIZES
        what = f"query heads per KV head {_listed(QUANTIZED_GROUP_SIZES)} (here {ratio})"
        one_of("kv_cache_dtype", "fp8_e4m3", ok, what, "flashinfer")


def check_native(spec: AttentionSpec, major: int) -> None:
    """Raise ValueError for a spec that flashinfer's own kernels do not serve."""
    ok, what = major >= 8, f"compute capability 8 or newer (this device has {major})"
    one_of("attention_backend", "flashinfer", ok, what, "torch_ref")
    check_dtypes(spec, "torch_ref")
    dim = spec.head_dim
    one_of("head_dim", dim, dim in NATIVE_HEAD_DIMS, _listed(NATIVE_HEAD_DIMS), "torch_ref")


def check_dtypes(spec: AttentionSpec, alternative: str) -> None:
    name = str(spec.dtype).removeprefix("torch.")
    one_of("dtype", name, spec.dtype in HALVES, "bfloat16, float16", alternative)
    ok = spec.kv_dtype in (spec.dtype, E4M3)
    kv_name = str(spec.kv_dtype).removeprefix("torch.")
    one_of("kv_cache_dtype", kv_name, ok, f"{name}, float8_e4m3fn", alternative)


def one_of(field: str, value: object, ok: bool, allowed: str, alternative: str) -> None:
    require(ok, field, value, f"{allowed}; or use attention_backend={alternative}")


def _listed(values: tuple[int, ...]) -> str:
    return f"one of {', '.join(map(str, values))}"

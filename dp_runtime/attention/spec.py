"""AttentionSpec: what an attention backend must serve for a rank's life."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dp_runtime.core.cache_spec import PagedKv
from dp_runtime.core.e4m3 import E4M3

ONE_TOKEN = frozenset({1})


@dataclass(frozen=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype  # of the page pools: `dtype` or float8_e4m3fn
    decode_query_lens: frozenset[int] = ONE_TOKEN  # lengths that a decode kernel serves
    check_device_values: bool = False  # debug: compare device tensors with host mirrors

    @property
    def cache(self) -> PagedKv:
        return PagedKv(self.num_kv_heads, self.head_dim, self.page_size, self.kv_dtype)

    @property
    def group_size(self) -> int:  # query heads that share a KV head
        return self.num_heads // self.num_kv_heads

    @property
    def dtypes(self) -> str:  # for the names of kernels
        names = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.kv_dtype))
        return " over ".join(names)

    @property
    def quantized(self) -> bool:
        return self.kv_dtype == E4M3


@dataclass(frozen=True)
class KvScales:
    """Per-tensor scales of one layer's cache: a stored value times its scale is the real one."""

    k: float = 1.0
    v: float = 1.0

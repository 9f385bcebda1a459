"""AttentionSpec: what a backend must serve for a rank's life; and what a backend is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dp_runtime.core.metadata import AttentionMetadata
from dp_runtime.core.rotation import QkNormRope
from dp_runtime.kernels.builds import JitModule


class AttentionBackend(Protocol):
    """Attention of one layer over the paged cache it is bound to.

    It sees rows and metadata, and can reach neither a batch, an agreement nor a config.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Append k and v to the cache, then attend causally.

        q [rows, num_heads, head_dim], k and v [rows, num_kv_heads, head_dim]
        -> [rows, num_heads, head_dim].
        """

    def attend_qkv(self, qkv: Tensor, rotation: QkNormRope, metadata: AttentionMetadata) -> Tensor:
        """The same of unrotated rows, on a GPU: one kernel makes q and appends k and v.

        qkv [rows, num_heads + 2 * num_kv_heads, head_dim] -> [rows, num_heads, head_dim].
        """


LayerBackends = Callable[[int], AttentionBackend]  # the backend of a layer
Pools = Sequence[Tensor]  # [layer], each [num_pages, 2, num_kv_heads, page_size, head_dim]
ONE_TOKEN = frozenset({1})


@dataclass(frozen=True)
class AttentionSpec:
    """Heads, cache and dtypes of a model's attention on one rank.

    kv_dtype: of the page pools, `dtype` or float8_e4m3fn. decode_query_lens: query lengths that
    a decode kernel serves (1: decode, 2..8: verification); any other is a prefill chunk.
    check_device_values: for debugging, compare device tensors with host mirrors in every pass.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    decode_query_lens: frozenset[int] = ONE_TOKEN
    check_device_values: bool = False

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def dtypes(self) -> str:
        """For the names of kernels."""
        names = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.kv_dtype))
        return " over ".join(names)

    @property
    def quantized(self) -> bool:
        return self.kv_dtype == torch.float8_e4m3fn


@dataclass(frozen=True)
class KvScales:
    """Per-tensor scales of one layer's cache: a stored value times its scale is the real one."""

    k: float = 1.0
    v: float = 1.0


class Backend(Protocol):
    """A module of this package that serves attention; importing it loads no GPU library."""

    def check(self, spec: AttentionSpec, device: torch.device) -> None:
        """ValueError for what its kernels do not support, with the field and the alternative."""

    def workspace_bytes(self, spec: AttentionSpec) -> int:
        """Device memory that `make` allocates."""

    def kernels(self, spec: AttentionSpec, device: torch.device) -> tuple[JitModule, ...]:
        """What must be compiled before the spec can be served."""

    def make(self, spec: AttentionSpec, pools: Pools, scales: Sequence[KvScales]) -> LayerBackends:
        """Backends of all layers; they share workspaces and what is planned once a pass."""

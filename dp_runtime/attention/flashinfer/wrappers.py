"""flashinfer's paged wrappers, and the modules that they run."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from flashinfer.prefill import get_batch_prefill_module
from flashinfer.utils import PosEncodingMode, determine_attention_backend
from torch import Tensor

from dp_runtime.attention.contract import offsets
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.core.attention_metadata import AttentionMetadata
from dp_runtime.kernels.jit_build import JitModule


class PagedWrappers:
    """Decodes alone take the decode wrapper (on tensor cores), all other passes the prefill one."""

    def __init__(self, spec: AttentionSpec, workspace_bytes: int, device: torch.device) -> None:
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        self._spec = spec
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        self._decode = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        self._planned: AttentionMetadata | None = None

    def plan(self, metadata: AttentionMetadata) -> None:
        (self._plan_decode if _decodes(metadata) else self._plan_prefill)(metadata)
        self._planned = metadata

    def run(
        self, q: Tensor, pool: Tensor, scales: KvScales, metadata: AttentionMetadata, out: Tensor
    ) -> None:
        assert metadata is self._planned, f"{metadata.place}: the wrappers planned another pass"
        wrapper = self._decode if _decodes(metadata) else self._prefill
        if self._spec.quantized:
            wrapper.run(q, pool, k_scale=scales.k, v_scale=scales.v, out=out)
        else:
            wrapper.run(q, pool, out=out)

    def _plan_prefill(self, metadata: AttentionMetadata) -> None:
        spec = self._spec
        self._prefill.plan(
            metadata.cu_seqlens_q,
            *self._pages(metadata),
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.page_size,
            causal=True,
            q_data_type=spec.dtype,
            kv_data_type=spec.kv_dtype,
        )

    def _plan_decode(self, metadata: AttentionMetadata) -> None:
        spec = self._spec
        self._decode.plan(
            *self._pages(metadata),
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.page_size,
            q_data_type=spec.dtype,
            kv_data_type=spec.kv_dtype,
        )

    def _pages(self, metadata: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor]:
        """Return indptr [requests + 1], page ids in use, tokens in each last page; all int32."""
        size = self._spec.page_size
        counts = (-(-metadata.seq_lens_host // size)).astype(np.int32)
        table = metadata.page_table_host
        used = np.arange(table.shape[1]) < counts[:, None]
        last = (metadata.seq_lens_host - (counts - 1) * size).astype(np.int32)
        device = metadata.seq_lens.device
        arrays = (offsets(counts), table[used], last)
        indptr, indices, lengths = (torch.from_numpy(array).to(device) for array in arrays)
        return indptr, indices, lengths


def _decodes(metadata: AttentionMetadata) -> bool:
    return bool((metadata.query_lens_host == 1).all())


def jit_modules(spec: AttentionSpec, device: torch.device) -> tuple[JitModule, ...]:
    """List FA2 for decode and, where FA3 does not serve the dtypes, for prefill too."""
    mode = PosEncodingMode.NONE.value
    prefill = determine_attention_backend(
        device, mode, False, False, spec.dtype, spec.kv_dtype,
        head_dim_qk=spec.head_dim, head_dim_vo=spec.head_dim,
    )  # fmt: skip
    dims = (spec.head_dim, spec.head_dim)
    arguments = (
        spec.dtype, spec.kv_dtype, spec.dtype, torch.int32, *dims, mode, False, False, False
    )  # fmt: skip
    what = f"{spec.dtypes}, head_dim {spec.head_dim}"
    return tuple(
        JitModule(f"{name} ({what})", partial(get_batch_prefill_module, name, *arguments))
        for name in sorted({"fa2", prefill})  # cached by flashinfer: `plan` will find them loaded
    )

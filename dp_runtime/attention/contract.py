"""What every eager attention call must satisfy; kernels themselves check none of it.

Values (page ids, lengths, offsets) are checked once per pass on the host when the metadata is
built; here shapes, dtypes, strides and devices are compared, without a device synchronisation.
Metadata and plans are frozen: the layer that first sees one checks it for all, with the devices;
shapes and dtypes of q, k and v are compared at each call, for what a kernel gets follows from them
and from the plan. With `check_device_values` device tensors are read back and compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_runtime.attention.kv_write import CacheSlots
from dp_runtime.attention.spec import (
    AttentionBackend,
    AttentionSpec,
    KvScales,
    LayerBackends,
    Pools,
)
from dp_runtime.core.batch import Int32, Int64
from dp_runtime.core.metadata import AttentionMetadata
from dp_runtime.core.rotation import QkNormRope
from dp_runtime.errors import ContractViolation

Comparison = tuple[str, object, object]  # what, as found, as due
TENSOR = ("shape", "dtype", "device", "contiguity")


@dataclass(eq=False)
class PassChecks:
    """What the layers of a rank have found in order for the pass at hand."""

    metadata: AttentionMetadata | None = None
    call: tuple[object, ...] = ()  # due for q, k and v, or for unrotated rows
    plan: object = None
    kernel_plan: object = None  # whose kernel calls are in order


@dataclass(frozen=True)
class LayerContract:
    """The calls that fit one layer's pool; the layers of a rank share `pass_checks`."""

    layer: int
    spec: AttentionSpec
    device: torch.device
    pass_checks: PassChecks = field(default_factory=PassChecks)

    def check(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> None:
        """Compare a call with its metadata; ContractViolation names place, layer and numbers."""
        found = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype)
        if metadata is self.pass_checks.metadata and found == self.pass_checks.call:
            return
        spec, rows = self.spec, metadata.num_tokens
        kv = (rows, spec.num_kv_heads, spec.head_dim)
        shapes = {"q": (rows, spec.num_heads, spec.head_dim), "k": kv, "v": kv}
        self._check_new((q, k, v), shapes, metadata)
        self.pass_checks.metadata, self.pass_checks.call = metadata, found

    def check_qkv(self, qkv: Tensor, rotation: QkNormRope, metadata: AttentionMetadata) -> None:
        """The same for rows that are still to be rotated."""
        given = (qkv, rotation.cos, rotation.sin, rotation.norm_weight)
        tensors = tuple(tensor for tensor in given if tensor is not None)
        found = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if metadata is self.pass_checks.metadata and found == self.pass_checks.call:
            return
        spec, rows = self.spec, metadata.num_tokens
        rotated, angles = spec.num_heads + spec.num_kv_heads, (rows, 1, spec.head_dim // 2)
        qkv_shape = (rows, rotated + spec.num_kv_heads, spec.head_dim)
        norm = (rotated, spec.head_dim)
        shapes = {"qkv": qkv_shape, "cos": angles, "sin": angles, "norm_weight": norm}
        self._check_new(tensors, shapes, metadata)
        self.pass_checks.metadata, self.pass_checks.call = metadata, found

    def check_slots(self, plan: object, slots: CacheSlots, metadata: AttentionMetadata) -> None:
        """Compare where a plan's rows are appended, once for all layers."""
        if plan is not self.pass_checks.plan:
            self.compare(slots_comparisons(slots, metadata, self.spec, self.device), metadata)
            self.pass_checks.plan = plan

    def compare(self, comparisons: Iterable[Comparison], metadata: AttentionMetadata) -> None:
        for what, found, due in comparisons:
            if found != due:
                raise ContractViolation(
                    f"{metadata.place}, layer {self.layer}: {what} is {_text(found)}, "
                    f"the metadata and the pool say {_text(due)}"
                )

    def _check_new(
        self,
        tensors: Sequence[Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        metadata: AttentionMetadata,
    ) -> None:
        """A call unlike the last one: its metadata, then each tensor; `shapes` may name more."""
        self.compare(metadata_comparisons(metadata, self.spec, self.device), metadata)
        for (name, shape), tensor in zip(shapes.items(), tensors):
            found = (tensor.shape, tensor.dtype, tensor.device)
            due = (shape, self.spec.dtype, self.device)
            what = (f"{name} {item}" for item in ("shape", "dtype", "device"))
            self.compare(zip(what, found, due), metadata)


def layer_backends(
    spec: AttentionSpec,
    pools: Pools,
    scales: Sequence[KvScales],
    attention: Callable[[Tensor, KvScales, LayerContract], AttentionBackend],
) -> LayerBackends:
    """`attention` over each layer's pool; the layers share what is in order for a pass."""
    pass_checks = PassChecks()

    def layer_backend(layer: int) -> AttentionBackend:
        pool = pools[layer]
        return attention(pool, scales[layer], LayerContract(layer, spec, pool.device, pass_checks))

    return layer_backend


def _text(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def metadata_comparisons(
    metadata: AttentionMetadata, spec: AttentionSpec, device: torch.device
) -> Iterable[Comparison]:
    """Every device tensor of a metadata against its host mirrors, which say what is due."""
    query_lens, seq_lens = metadata.query_lens_host, metadata.seq_lens_host
    table = metadata.page_table_host
    requests, rows = len(query_lens), int(query_lens.sum())
    yield "seq_lens_host rows", len(seq_lens), requests
    yield "page_table_host rows", len(table), requests
    shapes = {
        "cu_seqlens_q": ((requests + 1,), torch.int32),
        "seq_lens": ((requests,), torch.int32),
        "page_table": (table.shape, torch.int32),
        "slot_mapping": ((rows,), torch.int32),
    }
    for name, (shape, dtype) in shapes.items():
        yield from tensor_comparisons(name, getattr(metadata, name), shape, dtype, device)
    if spec.check_device_values:
        yield from value_comparisons("cu_seqlens_q", metadata.cu_seqlens_q, offsets(query_lens))
        yield from value_comparisons("seq_lens", metadata.seq_lens, seq_lens)
        yield from value_comparisons("page_table", metadata.page_table, table)
        slots = slots_due(metadata, spec.page_size)
        yield from value_comparisons("slot_mapping", metadata.slot_mapping, slots)


def slots_comparisons(
    slots: CacheSlots, metadata: AttentionMetadata, spec: AttentionSpec, device: torch.device
) -> Iterable[Comparison]:
    """Where appended rows go."""
    rows = (metadata.num_tokens,)
    yield "slots.page_size", slots.page_size, spec.page_size
    yield from tensor_comparisons("slots.mapping", slots.mapping, rows, torch.int32, device)
    if spec.check_device_values:
        due = slots_due(metadata, spec.page_size)
        yield from value_comparisons("slots.mapping", slots.mapping, due)


def tensor_comparisons(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterable[Comparison]:
    """What kernels take for granted beside a pointer; nothing if all of it is in order."""
    found = (tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous())
    due = (shape, dtype, device, True)
    if found != due:
        yield from zip((f"{name} {what}" for what in TENSOR), found, due)


def value_comparisons(name: str, tensor: Tensor, due: NDArray[Any]) -> Iterable[Comparison]:
    """The first value that differs from its host mirror; waits for the device."""
    found = tensor.cpu().numpy()
    wrong = np.argwhere(found != due)
    if len(wrong):
        at = tuple(int(index) for index in wrong[0])
        yield f"{name}[{', '.join(map(str, at))}] on the device", int(found[at]), int(due[at])


def offsets(lengths: Int32) -> Int32:
    """[n] lengths -> [n + 1] int32, where each begins and the last ends."""
    result = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=result[1:])
    return result


def slots_due(metadata: AttentionMetadata, page_size: int) -> Int64:
    """The cache slot of every row, from lengths and page table alone."""
    query_lens, seq_lens = metadata.query_lens_host, metadata.seq_lens_host
    owner = np.repeat(np.arange(len(query_lens)), query_lens)
    first = seq_lens - query_lens - offsets(query_lens)[:-1]
    positions = first[owner] + np.arange(len(owner))
    pages = metadata.page_table_host[owner, positions // page_size].astype(np.int64)
    slots: Int64 = pages * page_size + positions % page_size
    return slots

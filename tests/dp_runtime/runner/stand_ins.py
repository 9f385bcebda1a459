"""What stands on a CPU for a rank's graphs, attention kernels and pinned memory.

Everything else is real: which graphs there are, what they read, and when they are replayed. A graph
is run again over the tensors that it was captured with; Triton kernels are interpreted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_runtime.attention import registry
from dp_runtime.attention.kv_writer import KvWriter
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.core.batch import NULL_SLOT
from dp_runtime.core.recurrent_metadata import Drafts, RecurrentMetadata
from dp_runtime.layers.gated_delta_net import GatedDeltaNet
from dp_runtime.layers.moe_kernels import TorchMoe
from dp_runtime.layers.moe_router import Router
from dp_runtime.parallel.buckets import GraphKey
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.runner.graphs import graph_inputs, pass_graphs
from dp_runtime.runner.graphs.cuda_graph import GraphMemory
from dp_runtime.runner.graphs.forward_pieces import NOWHERE, Cut, ForwardPieces
from dp_runtime.startup import graph_capture
from tests.dp_runtime.fake_kernels import FakeKernels
from tests.dp_runtime.runner.paused_forward import PausedForward


class GroupedAttention(TrtllmBackend):
    """Plans as on a GPU; its kernels are plain torch."""

    capturable: ClassVar[bool] = True

    def __init__(
        self, spec: AttentionSpec, pools: Sequence[Tensor | None], scales: Sequence[KvScales] = ()
    ) -> None:
        super().__init__(spec, pools, scales, FakeKernels())

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec) -> int:
        return 0


class CountingMoe(TorchMoe):
    """Reads on the device which rows are real, if they are there."""

    def partial_sums(
        self, gathered: Tensor, plan: Any, row_ranges: Tensor | None, router: Router, experts: Any
    ) -> Tensor:
        if row_ranges is None:
            return super().partial_sums(gathered, plan, row_ranges, router, experts)
        starts, counts = row_ranges.tolist()
        rows = [row for start, n in zip(starts, counts) for row in range(start, start + n)]
        real = torch.tensor(rows, dtype=torch.int64)
        of_device = PaddingPlan.for_mode(PaddingMode.RAGGED, tuple(counts))
        sums = self._run(gathered[real], of_device, router, experts)
        return torch.zeros_like(gathered).index_copy_(0, real, sums)


class NoEvent:
    def synchronize(self) -> None: ...

    def record(self) -> None: ...


@dataclass(frozen=True)
class Again:
    """Stands for a captured graph."""

    run: Callable[[], object]
    output: object

    def replay(self) -> None:
        for old, new in zip(tensors_of(self.output), tensors_of(self.run()), strict=True):
            if old is not new:
                old.copy_(new)


def tensors_of(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    if is_dataclass(value):
        return [t for field in fields(value) for t in tensors_of(getattr(value, field.name))]
    return []


def capture_graph(run: Callable[[], Any], memory: object) -> tuple[Again, Any]:
    output = run()
    return Again(run, output), output


def host_buffer(words: int, shapes: dict[str, tuple[int, ...]]) -> Any:
    memory = torch.zeros(words, dtype=torch.int32)
    parts = {name: part.numpy() for name, part in graph_inputs._split(memory, shapes).items()}
    return graph_inputs._HostBuffer(memory, parts, NoEvent())  # type: ignore[arg-type]


def capture_pieces(pieces: ForwardPieces, key: GraphKey) -> PausedForward:
    cuts = list[Cut]()
    pieces._inputs.slot_mapping.fill_(NOWHERE)
    pieces.cut_forward(key, cuts.append)
    return PausedForward(pieces, key, cuts)


RUN_PLAIN = GatedDeltaNet.run_plain


def run_live(
    net: GatedDeltaNet, qkv: Tensor, z: Tensor, ba: Tensor, sequences: RecurrentMetadata
) -> Tensor:
    """Run in torch what has a slot, and leave null rows alone, as kernels do."""
    live = sequences.slots != NULL_SLOT
    lengths, drafts = sequences.query_lens_host, sequences.drafts
    rows = live.repeat_interleave(torch.from_numpy(lengths.copy()))
    lengths = lengths[live.numpy()]
    if drafts is not None:
        drafts = Drafts(drafts.num_drafts[live], drafts.num_accepted[live])
    ends = torch.from_numpy(np.concatenate(([0], lengths.cumsum())).astype(np.int32))
    slots, is_fresh = sequences.slots[live], sequences.is_fresh[live]
    of_live = RecurrentMetadata(ends, lengths, slots, is_fresh, drafts)
    out = torch.zeros_like(z)
    out[rows] = RUN_PLAIN(net, qkv[rows], z[rows], ba[rows], of_live)
    return out


def use_stand_ins(patch: pytest.MonkeyPatch, *, interprets: bool) -> None:
    """Let ranks in this process capture and replay; interprets: recurrent layers' kernels too."""
    patch.setitem(registry.BACKENDS, "torch_ref", f"{__name__}:GroupedAttention")
    patch.setattr(pass_graphs, "capture_graph", capture_graph)
    patch.setattr(graph_inputs, "_host_buffer", host_buffer)
    patch.setattr(graph_capture, "uncached_free_bytes", lambda device: 0)
    patch.setattr(GraphMemory, "new", lambda: None)
    patch.setattr(ForwardPieces, "_capture", capture_pieces)
    patch.setattr(KvWriter, "write", KvWriter.write_fused)
    run = GatedDeltaNet.run_kernels if interprets else run_live
    patch.setattr(GatedDeltaNet, "run_plain", run)
    patch.setattr("dp_runtime.layers.moe_kernels.MOE_KERNELS", {"torch": CountingMoe})

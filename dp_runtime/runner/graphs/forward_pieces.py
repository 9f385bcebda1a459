"""A forward as CUDA graphs of its pieces, cut where rows of a sequence meet.

What lies between, a MoE stage among it, depends on numbers of rows alone: the own ones and the
gathered, both padded to buckets. Kernels of attention and of recurrent layers need sizes that only
the host knows. A step with prefill then costs it one launch a layer beside theirs, not some thirty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.attention.backend import PagedAttention
from dp_runtime.attention.plan import AttentionPlan, CacheSlots, LayerCache
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.core.attention_metadata import AttentionMetadata, Place
from dp_runtime.core.recurrent_metadata import RecurrentLayer, RecurrentMetadata, RecurrentPlan
from dp_runtime.layers.gated_delta_net import GatedDeltaNet
from dp_runtime.models.causal_lm import Hidden, MaskedEmbeds, PassInputs, PassPlan, RowEmbeds
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import GraphKey, PieceBuckets
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.row_exchange import graph_exchange
from dp_runtime.runner.graphs.cuda_graph import GraphMemory, capturing_pieces

NOWHERE = -1  # the slot of a null row: its key and value are stored nowhere


@dataclass(frozen=True, eq=False)
class PieceInputs:
    """What pieces share with what is launched between them; rows beyond a batch's are null rows."""

    token_ids: Tensor  # [max_rows] int64
    positions: Tensor  # [3, max_rows] int64: of time, height and width
    embeds: Tensor  # [max_rows, hidden], where they take the place of tokens'
    is_embed: Tensor  # [max_rows, 1] bool
    hidden: Tensor  # [max_rows, n], read by draft models; n is 0 for others
    slot_mapping: Tensor  # [max_rows] int32
    q: Tensor  # [max_rows, num_heads, head_dim], left for the next attention
    attended: Tensor  # [max_rows, num_heads, head_dim], and what it writes
    projected: Tensor  # [max_rows, n], left for the next recurrent layer
    mixed: Tensor  # [max_rows, m], and what it writes; both 0 for a model without any

    @classmethod
    def zeros(
        cls,
        max_rows: int,
        hidden_size: int,
        reads_hidden: bool,
        spec: AttentionSpec,
        delta_nets: Sequence[GatedDeltaNet],
        device: torch.device,
    ) -> PieceInputs:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        heads = (max_rows, spec.num_heads, spec.head_dim)
        widths = {(net.shape.projected_size, net.shape.v_size) for net in delta_nets} or {(0, 0)}
        ((projected, mixed),) = widths  # all recurrent layers of a model are alike
        return cls(
            token_ids=zeros(max_rows, dtype=torch.int64),
            positions=zeros(3, max_rows, dtype=torch.int64),
            embeds=zeros(max_rows, hidden_size, dtype=spec.dtype),
            is_embed=zeros(max_rows, 1, dtype=torch.bool),
            hidden=zeros(max_rows, hidden_size if reads_hidden else 0, dtype=spec.dtype),
            slot_mapping=zeros(max_rows, dtype=torch.int32),
            q=zeros(*heads, dtype=spec.dtype),
            attended=zeros(*heads, dtype=spec.dtype),
            projected=zeros(max_rows, projected, dtype=spec.dtype),
            mixed=zeros(max_rows, mixed, dtype=spec.dtype),
        )

    def write(self, inputs: PassInputs, slots: CacheSlots, bucket: int) -> None:
        """Take a batch's rows, followed by null rows up to the bucket."""
        rows = len(inputs.token_ids)
        self.token_ids[:rows].copy_(inputs.token_ids)
        self.positions[:, :rows].copy_(inputs.positions)
        self.slot_mapping[:rows].copy_(slots.mapping)
        self.slot_mapping[rows:bucket].fill_(NOWHERE)
        self.is_embed[:bucket].zero_()
        if inputs.embeds is not None:
            embeds = inputs.embeds
            assert isinstance(embeds, RowEmbeds), "only pieces themselves read masked ones"
            self.embeds.index_copy_(0, embeds.rows, embeds.values.to(self.embeds.dtype))
            self.is_embed.index_fill_(0, embeds.rows, True)
        if self.hidden.shape[1]:
            self.hidden[:rows].copy_(inputs.hidden)

    def pass_inputs(self, rows: int) -> PassInputs:
        embeds = MaskedEmbeds(self.is_embed[:rows], self.embeds[:rows])
        positions, hidden = self.positions[:, :rows], self.hidden[:rows]
        return PassInputs(self.token_ids[:rows], positions, hidden, embeds)


@dataclass(frozen=True, eq=False)
class Attend:
    """A cut at which one layer's attention runs."""

    paged: PagedAttention


@dataclass(frozen=True, eq=False)
class Mix:
    """A cut at which a recurrent layer mixes the rows of each sequence."""

    layer: RecurrentLayer


Cut = Attend | Mix
OnCut = Callable[[Cut], None]


@dataclass(frozen=True, eq=False)
class CutPlan(AttentionPlan):
    """Attends nowhere: it makes a cut, at which a pass attends by its own plan."""

    inputs: PieceInputs
    on_cut: OnCut

    @property
    def queries(self) -> Tensor:
        return self.inputs.q[: self.num_tokens]

    def attend(self, q: Tensor, cache: LayerCache, out: Tensor | None = None) -> Tensor:
        assert q.data_ptr() == self.inputs.q.data_ptr(), "a pass attends from the pieces' queries"
        self.on_cut(Attend(PagedAttention(cache)))
        return self.inputs.attended[: len(q)]

    @classmethod
    def of_rows(cls, rows: int, spec: AttentionSpec, inputs: PieceInputs, on_cut: OnCut) -> CutPlan:
        """Plan for rows that are requests of one token each; no kernel reads this metadata."""
        device, ones = inputs.slot_mapping.device, np.ones(rows, np.int32)
        slots = inputs.slot_mapping[:rows]
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32, device=device),
            seq_lens=torch.ones(rows, dtype=torch.int32, device=device),
            page_table=torch.zeros(rows, 1, dtype=torch.int32, device=device),
            slot_mapping=slots,
            query_lens_host=ones,
            seq_lens_host=ones,
            page_table_host=np.zeros((rows, 1), np.int32),
            place=Place(-1, -1, f"captured in pieces of {rows} rows"),
        )
        return cls(metadata, CacheSlots(slots, spec.page_size), spec, inputs, on_cut)


@dataclass(frozen=True, eq=False)
class CutRecurrence(RecurrentPlan):
    """Mixes nothing: it makes a cut, at which a pass does so by its own sequences."""

    inputs: PieceInputs
    on_cut: OnCut

    def run(self, layer: RecurrentLayer, x: Tensor) -> Tensor:
        layer.project(x, self.inputs.projected[: len(x)])
        self.on_cut(Mix(layer))
        return self.inputs.mixed[: len(x)]


@dataclass(frozen=True, eq=False)
class _Captured:
    pieces: Sequence[torch.cuda.CUDAGraph]  # one before each cut, and one after the last
    cuts: Sequence[Cut]
    hidden: Hidden  # of the key's local rows


class ForwardPieces:
    """Captures one model's forward in pieces, and runs a pass with them.

    reads_hidden: the model takes hidden states beside tokens; poison: gathered padding is NaN.
    """

    def __init__(
        self,
        model: PassModel,
        collective: RowCollective,
        row_ranges: Tensor,  # [2, dp_size] int32, which MoE stages read: as PaddingPlan has them
        max_rows: int,
        memory: GraphMemory,
        *,
        reads_hidden: bool,
        poison: bool,
    ) -> None:
        exchanges = collective.dp_size > 1 and model.num_moe_layers > 0
        self.buckets = PieceBuckets(max_rows, exchanges)
        self._model, self._collective, self._memory = model, collective, memory
        self._row_ranges, self._poison = row_ranges, poison
        self._inputs = PieceInputs.zeros(
            max_rows, model.hidden_size, reads_hidden, model.backend.spec, model.delta_nets,
            row_ranges.device,
        )  # fmt: skip
        self._captured: dict[GraphKey, _Captured] = {}

    @property
    def count(self) -> int:
        return len(self.buckets.keys)

    def capture(self) -> Iterator[None]:
        """Capture every key's forward, and yield after each."""
        for key in self.buckets.keys:
            self._captured[key] = self._capture(key)
            yield

    def forward(self, inputs: PassInputs, plan: PassPlan, gathered: int) -> Hidden:
        """Run a pass of at least one row; valid until the next one.

        gathered: rows of every rank. The row_ranges are the pass's.
        """
        rows = len(inputs.token_ids)
        key = self.buckets.key(rows, gathered)
        captured = self._captured[key]
        attention, sequences, own = plan.attention, plan.recurrent, self._inputs
        own.write(inputs, attention.slots, key.local_rows)
        q, attended = own.q[:rows], own.attended[:rows]
        projected, mixed = own.projected[:rows], own.mixed[:rows]
        for piece, cut in zip(captured.pieces, captured.cuts):
            piece.replay()
            match cut:
                case Attend(paged):
                    paged.run(q, attention, attended)
                case Mix(layer):
                    assert isinstance(sequences, RecurrentMetadata), "a layer needs its sequences"
                    layer.mix(projected, sequences, mixed)
        captured.pieces[-1].replay()
        return captured.hidden.first(rows)

    def cut_forward(self, key: GraphKey, on_cut: OnCut) -> Hidden:
        """Run the forward of a key's rows; on_cut is called in place of what a cut runs."""
        rows = key.local_rows
        exchange = graph_exchange(
            self._collective, rows, key.gathered_rows, self._poison, self._row_ranges
        )
        attention = CutPlan.of_rows(rows, self._model.backend.spec, self._inputs, on_cut)
        plan = PassPlan(attention, CutRecurrence(self._inputs, on_cut))
        return self._model.forward(self._inputs.pass_inputs(rows), plan, exchange)

    def _capture(self, key: GraphKey) -> _Captured:
        cuts = list[Cut]()
        self._inputs.slot_mapping.fill_(NOWHERE)
        # Compiles, and connects to the other ranks: neither may happen while capturing.
        self.cut_forward(key, lambda cut: None)
        with capturing_pieces(self._memory) as capture:

            def on_cut(cut: Cut) -> None:
                cuts.append(cut)
                capture.cut()

            hidden = self.cut_forward(key, on_cut)
        return _Captured(capture.graphs, cuts, hidden)

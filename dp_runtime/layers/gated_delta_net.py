"""GatedDeltaNet: a layer that keeps a state of one size for each request, whatever its length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.core.cache_spec import LayerState, RecurrentState
from dp_runtime.core.recurrent_metadata import RecurrentMetadata, RecurrentPlan
from dp_runtime.kernels.gated_delta.rows import HeadShape
from dp_runtime.layers.delta_rule import DeltaRows, delta_rule, scratch_bytes
from dp_runtime.layers.linear import Projection, load_projection
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.sequence_groups import (
    REQUESTS_AT_ONCE,
    SequenceGroup,
    group_sequences,
)
from dp_runtime.weights.source import WeightSource

L2_EPS = 1e-6


@dataclass(frozen=True)
class GatedDeltaNetShape:
    hidden_size: int
    num_k_heads: int
    num_v_heads: int  # a multiple: each k head serves as many of these, one after the other
    head_k_dim: int
    head_v_dim: int
    conv_width: int
    norm_eps: float
    state_dtype: torch.dtype

    @cached_property
    def heads(self) -> HeadShape:
        return HeadShape(self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim)

    @property
    def k_size(self) -> int:
        return self.num_k_heads * self.head_k_dim

    @cached_property
    def v_size(self) -> int:
        return self.num_v_heads * self.head_v_dim

    @cached_property
    def channels(self) -> int:  # of q, k and v, which the convolution mixes in time
        return self.heads.channels

    @property
    def projected_size(self) -> int:  # q, k, v, the output's gate z, then b and a of each v head
        return self.channels + self.v_size + 2 * self.num_v_heads

    def state(self, dtype: torch.dtype, max_drafts: int) -> RecurrentState:
        """List what a request keeps: the convolution's last inputs, and the delta rule's state.

        With drafts: both as they were before the last of these, and the inputs of the drafts.
        """
        window = (self.conv_width - 1 + max_drafts, self.channels)
        heads = (self.num_v_heads, self.head_k_dim, self.head_v_dim)
        state = RecurrentState((window, heads), (dtype, self.state_dtype))
        if not max_drafts:
            return state
        gates = (max_drafts, 2, self.num_v_heads)
        return RecurrentState((*state.shapes, gates), (*state.dtypes, torch.float32))


@dataclass(frozen=True, eq=False)
class GatedDeltaNet:
    """Linear attention over this rank's own rows, [rows, hidden] -> [rows, hidden]."""

    inputs: Projection  # hidden -> projected_size
    conv: Tensor  # [conv_width, channels]
    decay: Tensor  # [num_v_heads] float32, -exp(A_log)
    dt_bias: Tensor  # [num_v_heads] float32
    norm: RMSNorm  # of each v head
    output: Projection
    state: LayerState  # as its shape lists it
    shape: GatedDeltaNetShape
    in_kernels: bool = False  # rows are mixed by Triton kernels, else in torch

    def __call__(self, x: Tensor, plan: RecurrentPlan) -> Tensor:
        return self.output(plan.run(self, x))

    def project(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self.inputs(x) if out is None else self.inputs.into(x, out)

    def mix(
        self, projected: Tensor, sequences: RecurrentMetadata, out: Tensor | None = None
    ) -> Tensor:
        """Mix [rows, inputs' outputs] -> [rows, v_size]."""
        ends = [self.shape.channels, self.shape.channels + self.shape.v_size]
        qkv, z, ba = projected.tensor_split(ends, 1)
        if self.in_kernels:
            return self.run_kernels(qkv, z, ba, sequences, out)
        mixed = self.run_plain(qkv, z, ba, sequences)
        return mixed if out is None else out.copy_(mixed)

    def run_plain(self, qkv: Tensor, z: Tensor, ba: Tensor, sequences: RecurrentMetadata) -> Tensor:
        """Mix the projected rows in torch -> [rows, v_size]."""
        attended = torch.empty_like(z)
        for group in group_sequences(sequences):
            attended[group.rows] = self._run(group, qkv[group.rows], ba[group.rows])
        heads = (z.shape[0], self.shape.num_v_heads, self.shape.head_v_dim)
        normed = self.norm(attended.view(heads))
        return (normed * F.silu(z.view(heads).float())).to(z.dtype).flatten(1)

    def run_kernels(
        self,
        qkv: Tensor,
        z: Tensor,
        ba: Tensor,
        sequences: RecurrentMetadata,
        out: Tensor | None = None,
    ) -> Tensor:
        """Mix them in Triton, in three launches for decodes alone and two more with prompts."""
        from dp_runtime.kernels.gated_delta.chunked import run_chunks
        from dp_runtime.kernels.gated_delta.convolution import convolve
        from dp_runtime.kernels.gated_delta.gated_norm import gated_rms_norm
        from dp_runtime.kernels.gated_delta.recurrent import step_rows

        windows, states, *gates = self.state
        vectors, draft_gates = (self.decay, self.dt_bias), gates[0] if gates else None
        rows = convolve(qkv, ba, self.conv, *vectors, windows, draft_gates, sequences)
        heads = self.shape.heads
        attended = z.new_empty(len(z), heads.num_v_heads, heads.head_v_dim)
        step_rows(rows, heads, states, attended, sequences, L2_EPS)
        run_chunks(rows, heads, states, attended, sequences, L2_EPS)
        return gated_rms_norm(attended, z, self.norm.weight, self.norm.eps, out)

    def activation_bytes(self, rows: int) -> int:
        """Count the most bytes a call allocates at once, whatever the requests."""
        inner = self.kernel_bytes(rows) if self.in_kernels else self._plain_bytes(rows)
        return self.inputs.activation_bytes(rows) + inner

    @property
    def max_drafts(self) -> int:
        return self.state[0].shape[1] - (self.shape.conv_width - 1)

    def replay_bytes(self, requests: int) -> int:
        """Count what kernels allocate beside for accepted drafts, which are run once more."""
        shape, size = self.shape, self.output.dtype.itemsize
        row = shape.channels * size + 2 * shape.num_v_heads * 4
        return requests * self.max_drafts * row if self.in_kernels else 0

    def kernel_bytes(self, rows: int) -> int:
        from dp_runtime.kernels.gated_delta.chunked import scratch_bytes

        shape, size = self.shape, self.output.dtype.itemsize
        convolved = shape.channels * size + 2 * shape.num_v_heads * 4
        chunks = scratch_bytes(rows, shape.heads, size)
        return rows * (convolved + shape.v_size * size) + max(chunks, rows * shape.v_size * size)

    def _plain_bytes(self, rows: int) -> int:
        shape, size = self.shape, self.output.dtype.itemsize
        requests, heads, channels = min(rows, REQUESTS_AT_ONCE), shape.num_v_heads, shape.channels
        outer = rows * shape.v_size * size
        columns = self.state[0].shape[1]  # of a window, the drafts that are run again included
        run = rows + requests * (columns - (shape.conv_width - 1))
        widened = 0 if size == 4 else run * channels * 4
        copied = run * (2 * channels + 2 * heads) * size + widened
        windows = requests * channels * columns * 2 * size
        vectors = run * 2 * heads * (shape.head_k_dim + 1) * 4
        dims = shape.head_k_dim, shape.head_v_dim
        inner = copied + windows + vectors + scratch_bytes(run, requests, heads, *dims)
        return outer + inner

    @classmethod
    def load(
        cls,
        shape: GatedDeltaNetShape,
        weights: WeightSource,
        prefix: str,
        inputs: Projection,
        state: LayerState,
    ) -> GatedDeltaNet:
        heads, hidden = shape.num_v_heads, shape.hidden_size
        kernel = (shape.channels, 1, shape.conv_width)
        return cls(
            inputs=inputs,
            conv=weights.load(f"{prefix}.conv1d.weight", kernel)[:, 0].T.contiguous(),
            decay=-weights.float32(f"{prefix}.A_log", (heads,)).exp(),
            dt_bias=weights.float32(f"{prefix}.dt_bias", (heads,)),
            norm=RMSNorm.load(weights, f"{prefix}.norm", shape.head_v_dim, shape.norm_eps),
            output=load_projection(weights, {f"{prefix}.out_proj": hidden}, shape.v_size),
            state=state,
            shape=shape,
            in_kernels=weights.runs_on.type == "cuda",
        )

    def _run(self, group: SequenceGroup, qkv: Tensor, ba: Tensor) -> Tensor:
        """Run rows of a group, [rows, channels] and [rows, 2 * num_v_heads] -> [rows, v_size]."""
        by_request = (len(group.slots), group.length, -1)
        mixed = self._convolve(group, qkv.view(by_request))
        rows = self._delta_rows(mixed, self._gates(group, ba.view(by_request)))
        drafts = group.num_drafts
        outputs, new = self._advance(group, rows.span(0, rows.length - drafts))
        if drafts:
            last, _ = delta_rule(rows.span(-drafts, None), new)
            outputs = torch.cat((outputs, last), 2)
        outputs = outputs[:, :, group.num_accepted :]
        return outputs.transpose(1, 2).flatten(2).flatten(0, 1).to(qkv.dtype)

    def _advance(self, group: SequenceGroup, rows: DeltaRows) -> tuple[Tensor, Tensor]:
        """Take the group's states past these rows; return outputs and the new states."""
        states = self.state[1]
        state, parts, at = group.start_from(states).float(), list[Tensor](), 0
        if group.num_tracked:
            at = group.num_accepted + group.num_tracked
            outputs, state = delta_rule(rows.span(0, at), state)
            states[group.track_slots] = state.to(states.dtype)
            parts.append(outputs)
        outputs, state = delta_rule(rows.span(at, None), state)
        states[group.slots] = state.to(states.dtype)
        return torch.cat((*parts, outputs), 2) if parts else outputs, state

    def _convolve(self, group: SequenceGroup, new: Tensor) -> Tensor:
        """Convolve [requests, rows, channels] with what came before, and keep the last inputs."""
        windows, width = self.state[0], self.shape.conv_width - 1
        before = group.start_from(windows)[:, : width + group.num_accepted]
        inputs = torch.cat((before, new), 1)
        kept = width + group.num_drafts
        windows[group.slots, :kept] = inputs[:, -kept:]
        if group.num_tracked:
            at = group.num_accepted + group.num_tracked
            windows[group.track_slots, :width] = inputs[:, at : at + width]
        weight = self.conv.T[:, None]
        mixed = F.conv1d(inputs.transpose(1, 2), weight, groups=self.shape.channels)
        return F.silu(mixed).transpose(1, 2)

    def _gates(self, group: SequenceGroup, ba: Tensor) -> Tensor:
        """Return each row's log of the decay, and its strength: [requests, rows, 2, heads].

        Rows that are run once more come first, with the gates that were kept.
        """
        b, a = ba.chunk(2, -1)
        g = self.decay * F.softplus(a.float() + self.dt_bias)
        gates = torch.stack((g, b.sigmoid().float()), 2)
        if group.num_accepted:
            gates = torch.cat((self.state[2][group.slots, : group.num_accepted], gates), 1)
        if group.num_drafts:
            kept = gates[:, -group.num_drafts :]
            self.state[2][group.slots, : group.num_drafts] = kept
        return gates

    def _delta_rows(self, mixed: Tensor, gates: Tensor) -> DeltaRows:
        shape = self.shape
        q, k, v = mixed.float().tensor_split([shape.k_size, 2 * shape.k_size], 2)
        g, beta = gates.unbind(2)
        return DeltaRows(
            self._k_heads(q) * shape.head_k_dim**-0.5,
            self._k_heads(k),
            _split_heads(v, shape.head_v_dim),
            g.transpose(1, 2),
            beta.transpose(1, 2),
        )

    def _k_heads(self, x: Tensor) -> Tensor:
        """Norm each head's vectors and give each v head its own; [requests, v heads, rows, dim]."""
        heads = _split_heads(x, self.shape.head_k_dim)
        normed = heads * (heads.pow(2).sum(-1, keepdim=True) + L2_EPS).rsqrt()
        return normed.repeat_interleave(self.shape.num_v_heads // self.shape.num_k_heads, 1)


def _split_heads(x: Tensor, dim: int) -> Tensor:
    """View [requests, rows, heads * dim] as [requests, heads, rows, dim]."""
    return x.view(*x.shape[:2], -1, dim).transpose(1, 2)

"""GatedDeltaNet: a layer that keeps a state of one size for each request, whatever its length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.core.cache_spec import LayerState, RecurrentState
from dp_runtime.core.recurrent_metadata import RecurrentMetadata
from dp_runtime.kernels.gated_delta.rows import HeadShape
from dp_runtime.layers.delta_rule import DeltaRows, delta_rule, scratch_bytes
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.weights.source import WeightSource

L2_EPS = 1e-6
REQUESTS_AT_ONCE = 8  # whose states are copied; bounds what a pass of many decodes needs


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

    @property
    def heads(self) -> HeadShape:
        return HeadShape(self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim)

    @property
    def k_size(self) -> int:
        return self.num_k_heads * self.head_k_dim

    @property
    def v_size(self) -> int:
        return self.num_v_heads * self.head_v_dim

    @property
    def channels(self) -> int:  # of q, k and v, which the convolution mixes in time
        return self.heads.channels

    def state(self, dtype: torch.dtype) -> RecurrentState:
        """List what a request keeps: the convolution's last inputs, and the delta rule's state."""
        window = (self.channels, self.conv_width - 1)
        heads = (self.num_v_heads, self.head_k_dim, self.head_v_dim)
        return RecurrentState((window, heads), (dtype, self.state_dtype))


@dataclass(frozen=True, eq=False)
class _Group:
    """Some requests of a pass that have equally many rows."""

    length: int
    rows: Tensor  # [requests * length]
    slots: Tensor  # [requests] int64
    is_fresh: Tensor  # [requests] bool

    def start_from(self, state: Tensor) -> Tensor:
        """Read the states [requests, ...]; a fresh request's is zero, whatever its slot holds."""
        own = state[self.slots]
        fresh = self.is_fresh.view(-1, *[1] * (own.dim() - 1))
        return own.masked_fill(fresh, 0)


def _groups(sequences: RecurrentMetadata) -> Iterator[_Group]:
    lengths, device = sequences.query_lens_host, sequences.slots.device
    starts = lengths.cumsum() - lengths
    for length in np.unique(lengths[lengths > 0]):
        equal = np.flatnonzero(lengths == length)
        for first in range(0, len(equal), REQUESTS_AT_ONCE):
            members = equal[first : first + REQUESTS_AT_ONCE]
            rows = (starts[members, None] + np.arange(length)).ravel()
            index, row_index = (torch.from_numpy(x).to(device) for x in (members, rows))
            slots, is_fresh = sequences.slots[index], sequences.is_fresh[index]
            yield _Group(int(length), row_index, slots, is_fresh)


@dataclass(frozen=True, eq=False)
class GatedDeltaNet:
    """Linear attention over this rank's own rows, [rows, hidden] -> [rows, hidden]."""

    inputs: Linear  # q, k, v, the output's gate z, then b and a of each v head
    conv: Tensor  # [channels, 1, conv_width]
    decay: Tensor  # [num_v_heads] float32, -exp(A_log)
    dt_bias: Tensor  # [num_v_heads] float32
    norm: RMSNorm  # of each v head
    output: Linear
    state: LayerState  # the windows [slots, channels, conv_width - 1], and the delta rule's states
    shape: GatedDeltaNetShape

    def __call__(self, x: Tensor, sequences: RecurrentMetadata) -> Tensor:
        shape = self.shape
        ends = [shape.channels, shape.channels + shape.v_size]
        qkv, z, ba = self.inputs(x).tensor_split(ends, 1)
        run = self.run_kernels if x.is_cuda else self.run_plain
        return self.output(run(qkv, z, ba, sequences))

    def run_plain(self, qkv: Tensor, z: Tensor, ba: Tensor, sequences: RecurrentMetadata) -> Tensor:
        """Mix the projected rows in torch -> [rows, v_size]."""
        attended = torch.empty_like(z)
        for group in _groups(sequences):
            attended[group.rows] = self._run(group, qkv[group.rows], ba[group.rows])
        heads = (z.shape[0], self.shape.num_v_heads, self.shape.head_v_dim)
        normed = self.norm(attended.view(heads))
        return (normed * F.silu(z.view(heads).float())).to(z.dtype).flatten(1)

    def run_kernels(
        self, qkv: Tensor, z: Tensor, ba: Tensor, sequences: RecurrentMetadata
    ) -> Tensor:
        """Mix them in Triton, in three launches for decodes alone and two more with prompts."""
        from dp_runtime.kernels.gated_delta.chunked import run_chunks
        from dp_runtime.kernels.gated_delta.convolution import convolve
        from dp_runtime.kernels.gated_delta.gated_norm import gated_rms_norm
        from dp_runtime.kernels.gated_delta.recurrent import step_rows

        windows, states = self.state
        vectors = self.decay, self.dt_bias
        rows = convolve(qkv, ba, self.conv, *vectors, windows, None, sequences)
        heads = self.shape.heads
        attended = z.new_empty(len(z), heads.num_v_heads, heads.head_v_dim)
        step_rows(rows, heads, states, attended, sequences, L2_EPS)
        run_chunks(rows, heads, states, attended, sequences, L2_EPS)
        return gated_rms_norm(attended, z, self.norm.weight, self.norm.eps)

    def activation_bytes(self, rows: int) -> int:
        """Count the most bytes a call allocates at once, whatever the requests."""
        inner = self.kernel_bytes(rows) if self.conv.is_cuda else self._plain_bytes(rows)
        return self.inputs.activation_bytes(rows) + inner

    def kernel_bytes(self, rows: int) -> int:
        from dp_runtime.kernels.gated_delta.chunked import scratch_bytes

        shape, size = self.shape, self.output.weight.dtype.itemsize
        convolved = shape.channels * size + 2 * shape.num_v_heads * 4
        chunks = scratch_bytes(rows, shape.heads, size)
        return rows * (convolved + shape.v_size * size) + max(chunks, rows * shape.v_size * size)

    def _plain_bytes(self, rows: int) -> int:
        shape, size = self.shape, self.output.weight.dtype.itemsize
        requests, heads, channels = min(rows, REQUESTS_AT_ONCE), shape.num_v_heads, shape.channels
        outer = rows * shape.v_size * size
        widened = 0 if size == 4 else rows * channels * 4
        copied = rows * (2 * channels + 2 * heads) * size + widened
        windows = requests * channels * (shape.conv_width - 1) * 2 * size
        vectors = rows * 2 * heads * (shape.head_k_dim + 1) * 4
        dims = shape.head_k_dim, shape.head_v_dim
        inner = copied + windows + vectors + scratch_bytes(rows, requests, heads, *dims)
        return outer + inner

    @classmethod
    def load(
        cls,
        shape: GatedDeltaNetShape,
        weights: WeightSource,
        prefix: str,
        inputs: Linear,
        state: LayerState,
    ) -> GatedDeltaNet:
        heads, hidden = shape.num_v_heads, shape.hidden_size
        kernel = (shape.channels, 1, shape.conv_width)
        return cls(
            inputs=inputs,
            conv=weights.load(f"{prefix}.conv1d.weight", kernel),
            decay=-weights.float32(f"{prefix}.A_log", (heads,)).exp(),
            dt_bias=weights.float32(f"{prefix}.dt_bias", (heads,)),
            norm=RMSNorm.load(weights, f"{prefix}.norm", shape.head_v_dim, shape.norm_eps),
            output=Linear.load(weights, {f"{prefix}.out_proj": hidden}, shape.v_size),
            state=state,
            shape=shape,
        )

    def _run(self, group: _Group, qkv: Tensor, ba: Tensor) -> Tensor:
        """Run rows of a group, [rows, channels] and [rows, 2 * num_v_heads] -> [rows, v_size]."""
        _, states = self.state
        by_request = (len(group.slots), group.length, -1)
        mixed = self._convolve(group, qkv.view(by_request))
        rows = self._delta_rows(mixed, ba.view(by_request))
        outputs, new = delta_rule(rows, group.start_from(states).float())
        states[group.slots] = new.to(states.dtype)
        return outputs.transpose(1, 2).flatten(2).flatten(0, 1).to(qkv.dtype)

    def _convolve(self, group: _Group, new: Tensor) -> Tensor:
        """Convolve [requests, rows, channels] with what came before, and keep the last inputs."""
        windows, _ = self.state
        inputs = torch.cat((group.start_from(windows), new.transpose(1, 2)), 2)
        windows[group.slots] = inputs[..., group.length :]
        mixed = F.conv1d(inputs, self.conv, groups=self.shape.channels)
        return F.silu(mixed).transpose(1, 2)

    def _delta_rows(self, mixed: Tensor, ba: Tensor) -> DeltaRows:
        shape = self.shape
        q, k, v = mixed.float().tensor_split([shape.k_size, 2 * shape.k_size], 2)
        b, a = ba.chunk(2, -1)
        g = self.decay * F.softplus(a.float() + self.dt_bias)
        return DeltaRows(
            self._k_heads(q) * shape.head_k_dim**-0.5,
            self._k_heads(k),
            _split_heads(v, shape.head_v_dim),
            g.transpose(1, 2),
            b.sigmoid().float().transpose(1, 2),
        )

    def _k_heads(self, x: Tensor) -> Tensor:
        """Norm each head's vectors and give each v head its own; [requests, v heads, rows, dim]."""
        heads = _split_heads(x, self.shape.head_k_dim)
        normed = heads * (heads.pow(2).sum(-1, keepdim=True) + L2_EPS).rsqrt()
        return normed.repeat_interleave(self.shape.num_v_heads // self.shape.num_k_heads, 1)


def _split_heads(x: Tensor, dim: int) -> Tensor:
    """View [requests, rows, heads * dim] as [requests, heads, rows, dim]."""
    return x.view(*x.shape[:2], -1, dim).transpose(1, 2)

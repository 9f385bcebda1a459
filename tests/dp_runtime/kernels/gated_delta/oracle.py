"""A gated delta net in plain float64 torch, row by row, and drawn inputs for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.core.recurrent_metadata import Drafts, RecurrentMetadata, Tracks
from dp_runtime.kernels.gated_delta.chunked import run_chunks
from dp_runtime.kernels.gated_delta.convolution import convolve
from dp_runtime.kernels.gated_delta.recurrent import step_rows
from dp_runtime.kernels.gated_delta.rows import HeadShape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Net:
    """The weights of one layer."""

    shape: HeadShape
    conv: Tensor  # [width, channels]
    decay: Tensor  # [num_v_heads]
    dt_bias: Tensor  # [num_v_heads]

    @property
    def width(self) -> int:
        return len(self.conv)

    @classmethod
    def draw(cls, shape: HeadShape, width: int, dtype: torch.dtype = torch.float32) -> Net:
        heads = shape.num_v_heads
        conv = torch.randn(width, shape.channels).to(DEVICE, dtype)
        decay = -torch.empty(heads).uniform_(0.05, 3.0).to(DEVICE)
        return cls(shape, conv, decay, torch.randn(heads).to(DEVICE))


@dataclass(frozen=True, eq=False)
class Rows:
    """What the projections give."""

    qkv: Tensor  # [rows, channels]
    ba: Tensor  # [rows, 2 * num_v_heads]

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.qkv[rows], self.ba[rows])

    @classmethod
    def draw(cls, shape: HeadShape, rows: int, dtype: torch.dtype = torch.float32) -> Rows:
        together = torch.randn(rows, shape.channels + 2 * shape.num_v_heads + 3).to(DEVICE, dtype)
        return cls(together[:, : shape.channels], together[:, shape.channels + 3 :])

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        return cls(torch.cat([x.qkv for x in parts]), torch.cat([x.ba for x in parts]))


@dataclass(eq=False)
class Caches:
    """One layer's states of all slots, dirty at first."""

    windows: Tensor
    states: Tensor
    draft_gates: Tensor | None

    @classmethod
    def dirty(cls, net: Net, num_slots: int, max_drafts: int = 0) -> Caches:
        shape = net.shape
        heads = (shape.num_v_heads, shape.head_k_dim, shape.head_v_dim)
        columns = net.width - 1 + max_drafts
        sizes = (columns, shape.channels), (max_drafts, 2, shape.num_v_heads), heads
        dtypes = net.conv.dtype, torch.float32, torch.float32
        windows, gates, states = (
            torch.full((num_slots, *size), torch.nan, dtype=dtype, device=DEVICE)
            for size, dtype in zip(sizes, dtypes)
        )
        return cls(windows, states, gates if max_drafts else None)

    def clone(self) -> Caches:
        gates = self.draft_gates
        return Caches(
            self.windows.clone(), self.states.clone(), None if gates is None else gates.clone()
        )


def sequences_of(
    lengths: Sequence[int],
    slots: Sequence[int],
    fresh: Sequence[bool],
    drafts: tuple[Sequence[int], Sequence[int]] | None = None,
    tracks: tuple[Sequence[int], Sequence[int]] | None = None,
) -> RecurrentMetadata:
    """drafts: those in these rows, and how many were accepted before; tracks: slots and rows."""
    query_lens = np.array(lengths, np.int32)
    ends = np.concatenate(([0], query_lens.cumsum())).astype(np.int32)
    counts = drafts and [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in drafts]
    return RecurrentMetadata(
        torch.from_numpy(ends).to(DEVICE),
        query_lens,
        torch.tensor(slots, dtype=torch.int64, device=DEVICE),
        torch.tensor(fresh, dtype=torch.bool, device=DEVICE),
        Drafts(*counts) if counts else None,
        tracks and tracks_of(*tracks),
    )


def tracks_of(slots: Sequence[int], rows: Sequence[int]) -> Tracks:
    on_host = np.array(rows, np.int32)
    there = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    return Tracks(there, torch.from_numpy(on_host).to(DEVICE), on_host)


def run(net: Net, rows: Rows, caches: Caches, sequences: RecurrentMetadata) -> Tensor:
    """Run a pass's rows with the kernels -> [rows, num_v_heads, head_v_dim]."""
    mixed = convolve(
        rows.qkv,
        rows.ba,
        net.conv,
        net.decay,
        net.dt_bias,
        caches.windows,
        caches.draft_gates,
        sequences,
    )
    heads = (net.shape.num_v_heads, net.shape.head_v_dim)
    out = torch.full((len(rows.qkv), *heads), torch.nan, dtype=rows.qkv.dtype, device=DEVICE)
    step_rows(mixed, net.shape, caches.states, out, sequences, EPS)
    run_chunks(mixed, net.shape, caches.states, out, sequences, EPS)
    return out


@dataclass(frozen=True, eq=False)
class Due:
    """What a sequence of rows makes of a fresh request."""

    outputs: Tensor  # [rows, num_v_heads, head_v_dim] float64
    state: Tensor  # [num_v_heads, head_k_dim, head_v_dim] float64
    window: Tensor  # [width - 1, channels] the last inputs


def expected(net: Net, rows: Rows) -> Due:
    """Run one request's rows from the beginning, by the definition."""
    shape = net.shape
    inputs = F.pad(rows.qkv.double().T, (net.width - 1, 0))
    mixed = F.silu(F.conv1d(inputs[None], net.conv.T[:, None].double(), groups=shape.channels))[0].T
    mixed = mixed.to(rows.qkv.dtype).double()  # the one rounding between the kernels
    k_size = shape.num_k_heads * shape.head_k_dim
    q, k, v = mixed.tensor_split([k_size, 2 * k_size], 1)
    q, k = (_k_heads(x, shape) for x in (q, k))
    v = v.unflatten(1, (shape.num_v_heads, shape.head_v_dim))
    b, a = rows.ba.double().chunk(2, 1)
    g = net.decay.double() * F.softplus(a + net.dt_bias.double())
    state = torch.zeros(shape.num_v_heads, shape.head_k_dim, shape.head_v_dim).to(q)
    outputs = []
    for q_t, k_t, v_t, g_t, beta in zip(q, k, v, g, b.sigmoid()):
        state = state * g_t.exp()[:, None, None]
        change = (v_t - torch.einsum("hk,hkv->hv", k_t, state)) * beta[:, None]
        state = state + torch.einsum("hk,hv->hkv", k_t, change)
        outputs.append(torch.einsum("hk,hkv->hv", q_t, state) * shape.head_k_dim**-0.5)
    return Due(torch.stack(outputs), state, inputs[:, inputs.shape[1] - net.width + 1 :].T)


def _k_heads(x: Tensor, shape: HeadShape) -> Tensor:
    heads = x.unflatten(1, (shape.num_k_heads, shape.head_k_dim))
    normed = heads / (heads.pow(2).sum(-1, keepdim=True) + EPS).sqrt()
    return normed.repeat_interleave(shape.num_v_heads // shape.num_k_heads, 1)

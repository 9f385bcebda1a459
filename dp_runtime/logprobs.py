"""Log probabilities of tokens, on the device, and their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.request import TokenLogprob

_ROWS_AT_ONCE = 128  # bounds the memory that the prompt's rows need beside their logits
_LOW_WORD = 0xFFFFFFFF


class HostCopy:
    """Tensors on their way to the host: started here, waited for in `wait`.

    NOTE: with overlap the next step is queued behind the copy, so reading the tensors themselves
    would wait for that step too.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
        self._done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> tuple[Tensor, ...]:
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Log probabilities of n tokens and of the k best ones at their positions."""

    token_ids: Tensor  # [n] int64
    chosen: Tensor  # [n] float32
    top_ids: Tensor  # [n, k] int64, best first, ties to the lowest id
    top: Tensor  # [n, k] float32
    top_n: tuple[int, ...]  # [n] how many of the k each row reports
    copy: HostCopy

    def to_host(self) -> tuple[TokenLogprob, ...]:
        """Wait for the copy to the host: one entry per row."""
        token_ids, chosen, top_ids, top = (tensor.tolist() for tensor in self.copy.wait())
        return tuple(
            TokenLogprob(token, value, tuple(zip(ids[:count], values[:count])))
            for token, value, ids, values, count in zip(token_ids, chosen, top_ids, top, self.top_n)
        )


def token_logprobs(logits: Tensor, token_ids: Tensor, top_n: Sequence[int]) -> Logprobs:
    """Log softmax of logits at the given tokens, and its top_n[i] best tokens in row i.

    logits [n, vocab] float32, token_ids [n] int64. A row's result depends on that row alone.
    """
    assert logits.dtype == torch.float32, f"logits are float32, not {logits.dtype}"
    assert token_ids.shape == logits.shape[:1] == (len(top_n),), "one token and top_n per row"
    k = min(max(top_n, default=0), logits.shape[1])
    slices = zip(torch.split(logits, _ROWS_AT_ONCE), torch.split(token_ids, _ROWS_AT_ONCE))
    parts = [_rows_logprobs(rows, ids, k) for rows, ids in slices]
    chosen, top_ids, top = (torch.cat(tensors) for tensors in zip(*parts))
    copy = HostCopy(token_ids, chosen, top_ids, top)
    return Logprobs(token_ids, chosen, top_ids, top, tuple(top_n), copy)


def _rows_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1)
    top_ids = _top_ids(logprobs, k)
    return chosen, top_ids, logprobs.gather(1, top_ids)


def _top_ids(values: Tensor, k: int) -> Tensor:
    """Ids [n, k] of the largest float32 values, ties to the lowest id.

    torch.topk leaves the order of ties open, and rounded logits tie often; so it gets distinct
    integer keys: the float's bits in an order-preserving form above, the inverted id below.
    """
    if k == 0:
        return torch.empty((len(values), 0), dtype=torch.int64, device=values.device)
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(values.shape[1], device=values.device)
    keys = (ordered.to(torch.int64) << 32) | (_LOW_WORD - ids)
    return _LOW_WORD - (keys.topk(k).values & _LOW_WORD)

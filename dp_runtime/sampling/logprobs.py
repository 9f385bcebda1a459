"""Log probabilities of tokens, on the device, and their way to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.core.device_copy import HostCopy
from dp_runtime.core.request import TokenLogprob

ROWS_AT_ONCE = 64  # rows of logits that are looked at together; bounds what that needs
_LOW_WORD = 0xFFFFFFFF

LogitsOf = Callable[[slice], Tensor]  # logits [n, vocab] float32 of a slice of some rows


def row_parts(num_rows: int) -> list[slice]:  # at least one, if an empty one
    return [slice(at, at + ROWS_AT_ONCE) for at in range(0, max(num_rows, 1), ROWS_AT_ONCE)]


@dataclass(frozen=True, eq=False)
class Logprobs:
    token_ids: Tensor  # [n] int64
    chosen: Tensor  # [n] float32
    top_ids: Tensor  # [n, k] int64, best first, ties to the lowest id
    top: Tensor  # [n, k] float32
    top_n: tuple[int, ...]  # [n] how many of the k each row reports
    copy: HostCopy

    def to_host(self) -> tuple[TokenLogprob, ...]:
        token_ids, chosen, top_ids, top = (tensor.tolist() for tensor in self.copy.wait())
        return tuple(
            TokenLogprob(token, value, tuple(zip(ids[:count], values[:count])))
            for token, value, ids, values, count in zip(token_ids, chosen, top_ids, top, self.top_n)
        )


def token_logprobs(
    logits_of: LogitsOf,
    token_ids: Tensor,  # [n] int64
    top_n: Sequence[int],  # [n] best tokens to report of each row
) -> Logprobs:
    """Take the log softmax at the tokens; logits_of gives some of the n rows at a time."""
    assert token_ids.shape == (len(top_n),), "one top_n per token"
    max_top_n = max(top_n, default=0)
    parts = [
        _rows_logprobs(logits_of(part), token_ids[part], max_top_n)
        for part in row_parts(len(top_n))
    ]
    chosen, top_ids, top = (torch.cat(tensors) for tensors in zip(*parts))
    copy = HostCopy(token_ids, chosen, top_ids, top)
    return Logprobs(token_ids, chosen, top_ids, top, tuple(top_n), copy)


def logprobs_bytes(num_rows: int, vocab_size: int) -> int:
    """Bound what `token_logprobs` allocates: of each logit its log probability, bits and key."""
    return min(num_rows, ROWS_AT_ONCE) * vocab_size * (4 + 4 + 8)


def _rows_logprobs(
    logits: Tensor, token_ids: Tensor, max_top_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    assert logits.dtype == torch.float32, f"logits are float32, not {logits.dtype}"
    assert logits.shape[:1] == token_ids.shape, "one token per row"
    k = min(max_top_n, logits.shape[1])
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1)
    top_ids = _top_ids(logprobs, k)
    return chosen, top_ids, logprobs.gather(1, top_ids)


def _top_ids(values: Tensor, k: int) -> Tensor:
    """Find the ids [n, k] of the largest float32 values, ties to the lowest id."""
    # topk leaves ties open; it gets integers: the float's ordered bits above, the inverted id below
    if k == 0:
        return torch.empty((len(values), 0), dtype=torch.int64, device=values.device)
    bits = values.view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    ids = torch.arange(values.shape[1], device=values.device)
    keys = ordered.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(_LOW_WORD - ids)
    return _LOW_WORD - (keys.topk(k).values & _LOW_WORD)

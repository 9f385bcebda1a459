"""Races between the tokens of a row: which comes first is a draw from the softmax of the logits.

Token v comes at time e_v / exp(logit_v). Where all e_v are independent and exponential, v comes
first with probability softmax(logits)_v; -log(e_v) is known as Gumbel noise (Gumbel-max; Maddison,
Tarlow and Minka, 2014). A sum of probabilities up to a random number would let each rounding move
all later boundaries; here it counts only where two tokens come first at the same time.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS_AT_ONCE = 2**16  # so much noise stays in a core's cache while it is made


def race(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of logits [n, vocab] float32 by the noise of its key [n] int64.

    Returns tokens [n] int64, ties to the lowest id, and whether a row had one: it has no NaN or
    +inf, and not -inf alone.
    """
    if logits.is_cuda:
        from dp_runtime.kernels.token_race import row_races

        return row_races(logits, keys)
    rows = max(NUMBERS_AT_ONCE // logits.shape[1], 1)
    parts = [slice(at, at + rows) for at in range(0, max(len(logits), 1), rows)]
    tokens, valid = zip(*(_race(logits[part], keys[part]) for part in parts))
    return torch.cat(tokens), torch.cat(valid)


def _race(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    noise = exponentials(keys, logits.shape[1]).log_()
    best, tokens = torch.sub(logits, noise, out=noise).max(-1)
    return tokens, best.isfinite()


def exponentials(keys: Tensor, num_tokens: int) -> Tensor:
    """Draw [n, num_tokens] float32 above 0 and below 17, which depend on key and token id alone.

    They are -log(1 - u) for a u of 31 bits, at least 2**-32, in float32: small ones, which decide
    most races, are precise. `kernels/token_race.py` makes the same u.
    """
    u = token_bits(keys, num_tokens).float()
    # The factor is just below 2**-31: what rounds up to 2**31 must not become 1.
    return u.add_(0.5).mul_((2.0**-24 - 1) * 2.0**-31).log1p_().neg_()


def token_bits(keys: Tensor, num_tokens: int) -> Tensor:
    """Mix each key with each token id: [n, num_tokens] int32 in 0..2**31-1.

    The steps between are Wellons' lowbias32 (2018), with half of the key before and half amid it:
    keys of which both halves are alike are needed for two rows to share a sequence.
    """
    low, high = keys.view(torch.int32).view(-1, 2, 1).unbind(1)
    ids = torch.arange(num_tokens, dtype=torch.int32, device=keys.device)
    bits = ids * _signed(0x9E3779B9) + low
    _xor_shifted_(bits, 16).mul_(_signed(0x7FEB352D)).bitwise_xor_(high)
    _xor_shifted_(bits, 15).mul_(_signed(0x846CA68B))
    return _xor_shifted_(bits, 16).bitwise_and_(0x7FFFFFFF)


def _xor_shifted_(bits: Tensor, count: int) -> Tensor:
    # torch shifts copies of the sign in
    return bits.bitwise_xor_((bits >> count).bitwise_and_(2 ** (32 - count) - 1))


def _signed(word: int) -> int:
    return (word + 2**31) % 2**32 - 2**31

"""How far served log probabilities are from transformers in float32, and its own in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from dp_runtime import RequestOutput
from dp_runtime.core.e4m3 import E4M3_MAX, quantize

# For checkpoints whose figures are compared. Rounding decides which experts a token takes where two
# nearly tie, and the tokens that it sends elsewhere, 4 in 100, differ 20 times as much as others:
# where 2 of 8 are taken, the same roundings on a CPU gave 0.2 to 2.5 times the p99 of transformers
# at 240 positions, by chance. Where all are taken it was 0.8 to 1.25 times, the mean 0.9 to 1.1.
ALL_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 8}
ROUNDED = "e4m3_cache"  # attention of transformers, of this file
FEW_POSITIONS = 1.35  # times transformers' p99 is allowed at some 240 positions


@dataclass(frozen=True, eq=False)
class Differences:
    """|log probability difference| to transformers in float32 at the same tokens, [positions]."""

    ours: Tensor
    theirs: Tensor  # of transformers in bf16

    def check(self, what: str, max_ratio: float = 1.25) -> None:
        """Print the figures, and assert that ours are at most `max_ratio` times theirs."""
        ours, theirs = figures(self.ours), figures(self.theirs)
        ratios = [one / other for one, other in zip(ours, theirs)]
        print(
            f"{what}: {len(self.ours)} positions, mean {ours[0]:.5f}, p99 {ours[1]:.4f}; "
            f"transformers in bf16 {theirs[0]:.5f}, {theirs[1]:.4f}; "
            f"ratios {ratios[0]:.2f}, {ratios[1]:.2f}"
        )
        assert max(ratios) <= max_ratio, (
            f"{what}: mean and p99 are {ratios} times transformers' own"
        )


def figures(differences: Tensor) -> tuple[float, float]:
    """Mean and 99th percentile."""
    return float(differences.mean()), float(differences.quantile(0.99))


def compare(
    model: Path,
    outputs: Sequence[RequestOutput],
    device: str = "cuda",
    attention: str | None = None,  # of transformers, by name
) -> tuple[Differences, Differences]:
    """The differences at prompt tokens (where they were asked for) and at output tokens.

    transformers sees each sequence at once: it is forced to the tokens that the engine saw.
    """
    sequences = [(*output.prompt_token_ids, *output.token_ids) for output in outputs]
    exact, rough = (
        next_logprobs(model, dtype, sequences, device, attention)
        for dtype in (torch.float32, torch.bfloat16)
    )
    at_prompt, at_output = [], []
    for output, one, other in zip(outputs, exact, rough):
        first = len(output.prompt_token_ids) - 1
        found = torch.tensor([entry.logprob for entry in output.logprobs or ()])
        at_output.append(((found - one[first:]).abs(), (other - one)[first:].abs()))
        if output.prompt_logprobs is not None:
            found = torch.tensor([entry.logprob for entry in output.prompt_logprobs])
            at_prompt.append(((found - one[:first]).abs(), (other - one)[:first].abs()))
    return _joined(at_prompt), _joined(at_output)


def next_logprobs(
    model: Path,
    dtype: torch.dtype,
    sequences: Sequence[Sequence[int]],
    device: str,
    attention: str | None = None,
) -> list[Tensor]:
    """Log probability of every token after the first, [tokens - 1] each, by transformers."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **chosen).eval().to(device)
    result = []
    for sequence in sequences:
        ids = torch.tensor([sequence], device=device)
        with torch.inference_mode():
            logprobs = peer(ids, use_cache=False).logits[0].float().log_softmax(-1)
        result.append(logprobs[:-1].gather(1, ids[0, 1:, None]).squeeze(1).cpu())
    return result


def rounded_attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: object, scaling: float, **__: Any
) -> tuple[Tensor, None]:
    """Attend causally in one sequence, [1, heads, tokens, dim], over keys and values in e4m3.

    In bf16 queries and weights are rounded to e4m3, too, as kernels for such caches do.
    """
    k, v = (rounded(x).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    rough = q.dtype == torch.bfloat16
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = ((rounded(q) if rough else q) @ k.transpose(2, 3)).float() * scaling
    scores = scores.masked_fill(~causal, -torch.inf)
    weights = E4M3_MAX * (scores - scores.amax(-1, keepdim=True)).exp()
    taken = rounded(weights) if rough else weights
    out = taken.to(q.dtype) @ v / weights.sum(-1, keepdim=True)
    return out.to(q.dtype).transpose(1, 2).contiguous(), None


def rounded(x: Tensor) -> Tensor:
    return quantize(x, 1.0).to(x.dtype)


AttentionInterface.register(ROUNDED, rounded_attention)


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> Differences:
    ours, theirs = zip(*pairs) if pairs else ((torch.zeros(0),), (torch.zeros(0),))
    return Differences(torch.cat(ours), torch.cat(theirs))

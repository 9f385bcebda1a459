"""Synthetic workloads: random prompts whose lengths follow a log-uniform distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.errors import require


@dataclass(frozen=True)
class Workload:
    """A number of requests, and inclusive ranges of their prompt and output lengths."""

    num_requests: int = 64
    input_len: tuple[int, int] = (16, 512)
    output_len: tuple[int, int] = (16, 128)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.num_requests >= 1, "num_requests", self.num_requests, "an integer >= 1")
        for name in ("input_len", "output_len"):
            low, high = getattr(self, name)
            require(1 <= low <= high, name, (low, high), "1 <= shortest <= longest")

    def make(self, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
        """Draw prompts of token ids, and greedy parameters that fix each output length."""
        rng = np.random.default_rng(self.seed)
        inputs, outputs = self._lengths(rng, self.input_len), self._lengths(rng, self.output_len)
        prompts = [rng.integers(0, vocab_size, length).tolist() for length in inputs]
        params = [
            SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
            for length in outputs
        ]
        return prompts, params

    def _lengths(self, rng: np.random.Generator, limits: tuple[int, int]) -> list[int]:
        low, high = limits
        drawn = np.exp(rng.uniform(np.log(low), np.log(high), self.num_requests))
        lengths: list[int] = np.clip(drawn.round().astype(int), low, high).tolist()
        return lengths

"""Data-parallel attention runtime for mixture-of-experts language models."""

from dp_runtime.config import EngineConfig
from dp_runtime.engine import Engine
from dp_runtime.handle import RequestHandle
from dp_runtime.request import (
    FinishReason,
    RequestDelta,
    RequestOutput,
    TokenLogprob,
    TokensPrompt,
)
from dp_runtime.sampling_params import SamplingParams

__all__ = [
    "Engine",
    "EngineConfig",
    "FinishReason",
    "RequestDelta",
    "RequestHandle",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
    "TokensPrompt",
]

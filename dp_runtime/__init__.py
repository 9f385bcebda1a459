"""Data-parallel attention runtime for mixture-of-experts language models."""

from dp_runtime.config import EngineConfig
from dp_runtime.core.request import (
    FinishReason,
    ImagePrompt,
    RequestDelta,
    RequestOutput,
    TokenLogprob,
    TokensPrompt,
)
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.engine.async_engine import AsyncEngine
from dp_runtime.engine.async_handle import AsyncRequestHandle
from dp_runtime.engine.engine import Engine
from dp_runtime.engine.request_handle import RequestHandle

__version__ = "0.2.0"

__all__ = [
    "AsyncEngine",
    "AsyncRequestHandle",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "ImagePrompt",
    "RequestDelta",
    "RequestHandle",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TokenLogprob",
    "TokensPrompt",
]

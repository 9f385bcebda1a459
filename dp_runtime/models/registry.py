"""Supported architectures and the modules that implement them, imported when first used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """How config.json names a model family, and the module that parses and builds it.

    The module has `parse_config(fields, eos_token_ids) -> ModelConfig` and
    `build(config, weights, sharding, attention) -> Model`.
    """

    model_type: str
    module: str


ARCHITECTURES = {
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe", "dp_runtime.models.qwen3_moe"),
    "MixtralForCausalLM": Architecture("mixtral", "dp_runtime.models.mixtral"),
}


def architecture_module(name: str) -> Any:
    return import_module(ARCHITECTURES[name].module)

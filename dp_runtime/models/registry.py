"""The model families: found by the name in config.json, each in a module imported when used."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.core.cache_spec import LayerState
from dp_runtime.errors import require
from dp_runtime.layers.moe import RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels, make_moe_kernels
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.known_tensors import HINTS, SKIPPABLE, SKIPPABLE_WITHOUT_IMAGES
from dp_runtime.models.model import Model
from dp_runtime.weights.files import is_present
from dp_runtime.weights.source import WeightSource

ARCHITECTURES = {  # the module of each has an `Architecture` of this name
    "Qwen3MoeForCausalLM": "dp_runtime.models.qwen3_moe",
    "MixtralForCausalLM": "dp_runtime.models.mixtral",
    "Qwen3_5MoeForCausalLM": "dp_runtime.models.qwen3_5.moe",
    "Qwen3_5MoeForConditionalGeneration": "dp_runtime.models.qwen3_5.multimodal",
    "Qwen3NextForCausalLM": "dp_runtime.models.qwen3_5.next",
}


class Architecture(Protocol):
    """A model family; its module has one, named ARCHITECTURE."""

    @property
    def model_type(self) -> str:  # of config.json
        ...

    def parse_config(self, fields: ConfigFields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
        """Read every field on which a result depends; ValueError for what is not supported."""

    def build(
        self,
        config: ModelConfig,
        weights: WeightSource,
        sharding: RankSharding,
        backend: AttentionBackend,
        moe: MoeKernels,
        states: Sequence[LayerState],
    ) -> Model:
        """Load one rank's part of a model, its layers bound to their caches.

        backend: over the pages of the layers that attend. states: of the others, [layer].
        """


def find_architecture(name: str) -> Architecture:
    architecture: Architecture = import_module(ARCHITECTURES[name]).ARCHITECTURE
    return architecture


def read_model_config(directory: str) -> ModelConfig:
    """Parse config.json and generation_config.json; ValueError for what is not supported."""
    root = Path(directory)
    require(root.is_dir(), "model", directory, "an existing directory")
    path = root / "config.json"
    require(is_present(path), "model", directory, "a directory with a config.json")
    adapter = root / "adapter_config.json"
    require(not is_present(adapter), str(adapter), "present", "an adapter is not applied: merge it")
    fields = ConfigFields.read(path)
    architecture = find_architecture(check_architecture(fields))
    eos = fields.integers("eos_token_id")
    generation = root / "generation_config.json"
    if is_present(generation):
        eos = ConfigFields.read(generation).integers("eos_token_id") or eos
    return architecture.parse_config(fields, eos)


def check_architecture(fields: ConfigFields) -> str:
    names = fields.get("architectures")
    ok = isinstance(names, list) and len(names) == 1 and names[0] in list(ARCHITECTURES)
    fields.require(ok, "architectures", names, f"one of {', '.join(ARCHITECTURES)}")
    name = str(names[0])
    model_type = find_architecture(name).model_type
    fields.require(
        fields.get("model_type") == model_type, "model_type", fields.get("model_type"),
        f"{name} has model_type {model_type!r}",
    )  # fmt: skip
    return name


def build_model(
    config: ModelConfig,
    weights: WeightSource,
    sharding: RankSharding,
    backend: AttentionBackend,
    moe_backend: str = "torch",
    states: Sequence[LayerState] = (),
) -> Model:
    """Load one rank's part of a model, and check that its checkpoint has nothing else to say."""
    architecture = find_architecture(config.architecture)
    moe = make_moe_kernels(moe_backend)
    model = architecture.build(config, weights, sharding, backend, moe, states)
    others = SKIPPABLE_WITHOUT_IMAGES if config.vision is None else {}
    weights.require_all_read({**SKIPPABLE, **others}, HINTS)
    return model

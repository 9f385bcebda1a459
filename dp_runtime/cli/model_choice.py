"""The configuration that a command line describes."""

from __future__ import annotations

import argparse
from pathlib import Path

from dp_runtime.cli.flags import given_fields
from dp_runtime.config import EngineConfig
from dp_runtime.errors import require

TINY_MODEL = Path(__file__).parent / "tiny_model"
DEMO_RANKS = 4


def config_from(options: argparse.Namespace) -> EngineConfig:
    """Take the fields that are given; without a model, the tiny one on DEMO_RANKS ranks."""
    given = given_fields(options, EngineConfig)
    if "model" in given:
        given["model"] = _directory(given["model"])
    else:
        given = {"model": str(TINY_MODEL), "dp_size": DEMO_RANKS} | given
    return EngineConfig(**given)


def example_models() -> dict[str, Path]:
    """The checkpoints of the examples by name: tiny_moe, say; an installed package has none."""
    found = Path(__file__).parents[2].glob("examples/*/checkpoint/config.json")
    return {file.parents[1].name: file.parent for file in sorted(found)}


def _directory(model: str) -> str:
    """Find the model of an example that is named; a directory of this name goes before it."""
    examples = example_models()
    if Path(model).name != model or Path(model).exists() or not examples:
        return model
    require(model in examples, "model", model, f"a directory, or one of {', '.join(examples)}")
    return str(examples[model])

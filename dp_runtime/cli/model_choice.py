"""The configuration that a command line describes."""

from __future__ import annotations

import argparse
from pathlib import Path

from dp_runtime.cli.flags import given_fields
from dp_runtime.config import EngineConfig
from dp_runtime.models.example_models import model_directory

TINY_MODEL = Path(__file__).parent / "tiny_model"
DEMO_RANKS = 4


def config_from(options: argparse.Namespace) -> EngineConfig:
    """Take the fields that are given; without a model, the tiny one on DEMO_RANKS ranks."""
    given = given_fields(options, EngineConfig)
    if "model" in given:
        given["model"] = model_directory(given["model"])
    else:
        given = {"model": str(TINY_MODEL), "dp_size": DEMO_RANKS} | given
    return EngineConfig(**given)

"""Flags that several benchmarks have, and the JSON lines that they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dp_runtime import EngineConfig

BOOL = argparse.BooleanOptionalAction
FLAGS: dict[str, dict[str, Any]] = {
    "model": {"required": True},
    "dp_size": {"type": int, "default": 4},
    "device": {"choices": ["cpu", "cuda"], "default": "cuda"},
    "moe_sharding": {"default": "ep"},
    "moe_backend": {"default": "auto"},
    "dense_backend": {"default": "auto"},
    "collective": {"default": "auto"},
    "cuda_graphs": {"action": BOOL, "default": None},
    "overlap": {"action": BOOL, "default": True},
    "speculative_num_steps": {"type": int, "default": 0},
    "speculative_draft_vocab": {"type": int},
    "max_step_ms": {"type": float, "help": "target for steps with prefill beside decodes"},
    "forced_tokens": {"type": float, "help": "that a verification emits, forced"},
    "kernels": {"action": "store_true", "help": "list all of a profile, not its groups"},
    "read_rate": {"type": float, "help": "TB/s, for the floor"},
    "json": {"type": Path},
}


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser described by the first line of a benchmark's docstring."""
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0])


def add_flags(parser: argparse.ArgumentParser, *names: str, **changed: Any) -> None:
    """Add flags of FLAGS by name, and those that a benchmark has with another default."""
    for name in (*names, *changed):
        options = FLAGS[name] | ({"default": changed[name]} if name in changed else {})
        parser.add_argument("--" + name.replace("_", "-"), **options)


def write_figures(figures: Mapping[str, Any], path: Path | None, **extra: Any) -> None:
    """Print figures as a JSON line; the line that is appended to a file has `extra` too."""
    print(json.dumps(figures), flush=True)
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({**figures, **extra}) + "\n")


def config_from(args: argparse.Namespace, **given: Any) -> EngineConfig:
    """Return a config of the flags that are named as its fields, and of what is `given` beside."""
    names = [item.name for item in fields(EngineConfig) if item.name in args]
    return EngineConfig(**{name: getattr(args, name) for name in names} | given)

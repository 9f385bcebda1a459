"""Files that an experiment names: seen from its own directory, and told apart by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_runtime.experiments.tables import within
from dp_runtime.models.example_models import model_directory
from dp_runtime.parallel.policies.policy_name import SUFFIX, PolicyName

PATHS = ("path", "model", "speculative_draft_model")  # fields that name a file or a directory
POLICIES = ("padding", "routing", "prefill_budget", "speculative_draft_length")  # or FILE.py:CLASS


def with_paths(value: Any, home: Path) -> Any:
    """Return nested tables whose paths are absolute; ValueError for a model that nobody knows."""
    if isinstance(value, Mapping):
        return {name: _with_path(name, inner, home) for name, inner in value.items()}
    return value


def _with_path(name: str, value: Any, home: Path) -> Any:
    if isinstance(value, str) and _names_file(name, value):
        path = model_directory(value, home) if name == "model" else value
        return str((home / path).resolve())
    with within(name):
        return with_paths(value, home)


def digests(value: Any) -> dict[str, str]:
    """Return the SHA-256 of every file that the tables name, by path; directories are left out."""
    found: dict[str, str] = {}
    if isinstance(value, Mapping):
        for name, inner in value.items():
            file = PolicyName(inner).file if name in POLICIES else inner
            if isinstance(inner, str) and _names_file(name, inner) and Path(file).is_file():
                found[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
            found |= digests(inner)
    return found


def _names_file(name: str, value: str) -> bool:
    return name in PATHS or (name in POLICIES and SUFFIX in value)

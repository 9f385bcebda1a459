"""Files that an experiment names: seen from its own directory, and told apart by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATHS = ("path", "model", "speculative_draft_model")  # fields that name a file or a directory


def with_paths(value: Any, home: Path) -> Any:
    """Return nested tables whose paths are absolute."""
    if isinstance(value, Mapping):
        return {
            name: str((home / inner).resolve())
            if name in PATHS and isinstance(inner, str)
            else with_paths(inner, home)
            for name, inner in value.items()
        }
    return value


def digests(value: Any) -> dict[str, str]:
    """Return the SHA-256 of every file that the tables name, by path; directories are left out."""
    found: dict[str, str] = {}
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name in PATHS and Path(str(inner)).is_file():
                found[inner] = hashlib.sha256(Path(inner).read_bytes()).hexdigest()
            found |= digests(inner)
    return found

"""The sampling parameters that a checkpoint's authors recommend, in generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dp_runtime.errors import require
from dp_runtime.weights.files import is_present, read_json

RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_sampling_defaults(directory: str) -> dict[str, Any]:
    """Read the values as the file has them; those that are null or absent are left out."""
    path = Path(directory, "generation_config.json")
    values = read_json(path) if is_present(path) else {}
    require(isinstance(values, dict), path.name, values, "a JSON object")
    return {name: values[name] for name in RECOMMENDED if values.get(name) is not None}

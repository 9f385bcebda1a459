"""Point: one combination of a grid's values, with all that follows from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dp_runtime.config import EngineConfig
from dp_runtime.experiments.scenario.scenario import Scenario
from dp_runtime.experiments.workload.workload import Workload


@dataclass(frozen=True)
class Point:
    """What is served and how; equal points do the same work."""

    varied: Mapping[str, Any]  # the values of the grid, by their dotted names
    document: Mapping[str, Any]  # the tables of this point
    config: EngineConfig
    workload: Workload
    scenario: Scenario

    @property
    def key(self) -> str:
        """Name the point by what it does, whatever place in the grid it has."""
        text = json.dumps(self.document, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def pinned(self) -> bool:
        """Tell whether requests say which ranks they want."""
        conversations = self.workload.conversations(self.config.dp_size)
        return any(each.dp_rank is not None for each in conversations)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.varied.items()) or "one point"


@dataclass(frozen=True)
class Run:
    """A point served once."""

    point: Point
    repeat: int  # from 0

    @property
    def name(self) -> str:  # of its directory
        return f"{self.point.key}-{self.repeat}"

    def __str__(self) -> str:
        return f"{self.point}, repeat {self.repeat}"

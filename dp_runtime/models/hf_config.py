"""ConfigFields: a checked reader of config.json that knows which fields nobody understood."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dp_runtime.core.plain_values import plain_float
from dp_runtime.errors import require
from dp_runtime.models.known_fields import ALIASES, fixed_values, is_irrelevant
from dp_runtime.weights.files import read_json, shown

MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 1e30  # far below the largest float32
MAX_INTEGERS: Mapping[str, int] = {
    # Far beyond any model: a larger number is a mistake that would cost hours or all memory.
    "num_hidden_layers": 1024, "num_experts": 4096, "num_local_experts": 4096,
    "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 4096,
    "hidden_size": 2**17, "intermediate_size": 2**20, "moe_intermediate_size": 2**20,
    "vocab_size": 2**24, "draft_vocab_size": 2**24, "max_position_embeddings": 2**27,
    "original_max_position_embeddings": 2**27, "shared_expert_intermediate_size": 2**20,
    "linear_num_key_heads": 4096, "linear_num_value_heads": 4096, "linear_key_head_dim": 4096,
    "linear_value_head_dim": 4096, "linear_conv_kernel_dim": 256,
}  # fmt: skip


class ConfigFields:
    """Typed access to the fields of one JSON object; every error names file, field and value."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where = where
        self._values = values
        self._known: dict[str, Any] = {}  # what readers took each field for

    @classmethod
    def read(cls, path: Path, where: str = "") -> ConfigFields:
        values = read_json(path)
        require(isinstance(values, dict), str(path), type(values).__name__, "a JSON object")
        return cls(where or path.name, values)

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    @property
    def is_empty(self) -> bool:
        return all(value is None for value in self._values.values())

    def is_null(self, name: str) -> bool:
        return name in self._values and self._values[name] is None

    def get(self, name: str, default: Any = None) -> Any:  # null counts as absent
        value = self._values.get(name)
        self._known[name] = default if value is None else value
        return self._known[name]

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value, maximum = self.get(name, default), MAX_INTEGERS.get(name, MAX_INTEGER)
        ok = isinstance(value, int) and not isinstance(value, bool) and minimum <= value
        self.require(ok, name, value, f"an integer >= {minimum}")
        self.require(value <= maximum, name, value, f"an integer <= {maximum:,}")
        return int(value)

    def number(self, name: str, default: float | None = None, minimum: float = 0.0) -> float:
        value = self.get(name, default)
        number = plain_float(value)
        ok = number is not None and number > minimum
        self.require(ok, name, value, f"a number above {minimum:g}")
        self.require(value <= MAX_NUMBER, name, value, f"a number <= {MAX_NUMBER:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        self.require(isinstance(value, bool), name, value, "true or false")
        return bool(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """Read an integer, a list of them, or nothing; all >= 0."""
        value = self.get(name, [])
        items = value if isinstance(value, list) else [value]
        ok = all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_INTEGER for i in items
        )
        self.require(ok, name, value, "an integer >= 0 or a list of them")
        return tuple(items)

    def section(self, name: str) -> ConfigFields | None:
        value = self.get(name)
        if value is None:
            return None
        self.require(isinstance(value, dict), name, value, "an object or null")
        return ConfigFields(f"{self.where}: {name}", value)

    def one_of(self, *names: str) -> str:
        """Choose the spelling of a field that is there; ValueError if two say different things."""
        present = [name for name in names if name in self] or [names[0]]
        for other in present[1:]:
            self.require_equal(other, present[0])
        return present[0]

    def only(self, name: str, allowed: Any) -> None:
        """Refuse any other value; absent is fine."""
        value = self.get(name, allowed)
        self.require(
            value == allowed, name, value, f"only {shown(json.dumps(allowed))} is supported"
        )

    def skip(self, names: Iterable[str]) -> None:
        """Ignore fields that can't change a result of this architecture."""
        self._known.update(dict.fromkeys(names))

    def finish(self) -> None:
        """Refuse fields that nobody read: they might change results."""
        for name in self._left():
            self.require(False, name, self._values[name], "this field is not supported")

    def finish_known(self, fixed: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...]:
        """Judge fields that nobody read by `known_fields`; return the unknown ones.

        Raises ValueError for a value that changes the mathematics or contradicts another field.
        """
        unknown = []
        for name in self._left():
            allowed = fixed.get(name, fixed_values(name))
            if ALIASES.get(name) in self._known:
                self.require_equal(name, ALIASES[name])
            elif is_irrelevant(name):
                continue
            elif allowed is not None:
                values = " or ".join(map(json.dumps, allowed))
                text = f"only {values} is supported" if values else "this field is not supported"
                self.require(self._values[name] in allowed, name, self._values[name], text)
            else:
                unknown.append(shown(name, 60))
        return tuple(unknown)

    def _left(self) -> list[str]:
        return [name for name in self._values if name in self and name not in self._known]

    def require_equal(self, name: str, other: str) -> None:
        value, expected = self._values.get(name), self._known.get(other, self._values.get(other))
        self._known[name] = value
        self.require(value == expected, name, value, f"{other} is {shown(expected)}")

    def require(self, ok: bool, name: str, value: object, allowed: str) -> None:
        require(ok, f"{self.where}: {shown(name, 60)}", value, allowed)

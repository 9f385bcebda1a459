"""ConfigFields: a checked reader of config.json that knows which fields nobody understood."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dp_runtime.errors import require

# For training, generation defaults or other libraries; inference does not change with them.
IRRELEVANT = frozenset(
    [
        *("architectures", "model_type", "_name_or_path", "transformers_version"),
        *("torch_dtype", "dtype", "use_cache", "tokenizer_class", "pretraining_tp"),
        *("bos_token_id", "pad_token_id", "sep_token_id", "eos_token_id"),
        *("decoder_start_token_id", "num_nextn_predict_layers"),
        *("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "initializer_range"),
        *("router_aux_loss_coef", "router_jitter_noise", "output_router_logits"),
        *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task"),
        *("_attn_implementation", "_attn_implementation_autoset", "_experts_implementation"),
    ]
)
IRRELEVANT_PREFIXES = ("mtp_",)


class ConfigFields:
    """Typed access to the fields of one JSON object; every error names file, field and value."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where = where
        self._values = values
        self._known: set[str] = set()

    @classmethod
    def read(cls, path: Path, where: str = "") -> ConfigFields:
        """The JSON object in `path`, in messages `where`; ValueError if there is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        require(isinstance(values, dict), str(path), type(values).__name__, "a JSON object")
        return cls(where or path.name, values)

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is; null counts as absent."""
        self._known.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(name, default)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
        self.require(ok, name, value, f"an integer >= {least}")
        return int(value)

    def number(self, name: str, default: float | None = None, least: float = 0.0) -> float:
        value = self.get(name, default)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        ok = ok and math.isfinite(value) and value > least
        self.require(ok, name, value, f"a number above {least:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        self.require(isinstance(value, bool), name, value, "true or false")
        return bool(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """An integer, a list of them, or absent; all >= 0."""
        value = self.get(name, [])
        items = value if isinstance(value, list) else [value]
        ok = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in items)
        self.require(ok, name, value, "an integer >= 0 or a list of them")
        return tuple(items)

    def section(self, name: str) -> ConfigFields | None:
        """A nested object, or None if it is absent."""
        value = self.get(name)
        if value is None:
            return None
        self.require(isinstance(value, dict), name, value, "an object or null")
        return ConfigFields(f"{self.where}: {name}", value)

    def only(self, name: str, allowed: Any) -> None:
        """A field for which one value is supported; absent is fine."""
        value = self.get(name, allowed)
        self.require(value == allowed, name, value, f"only {json.dumps(allowed)} is supported")

    def skip(self, names: Iterable[str]) -> None:
        """Fields that can't change a result of this architecture."""
        self._known.update(names)

    def finish(self) -> None:
        """ValueError if a field is left that nobody read: it might change results."""
        for name, value in self._values.items():
            known = name in self._known or name in IRRELEVANT
            known = known or name.startswith(IRRELEVANT_PREFIXES) or value is None
            self.require(known, name, value, "this field is not supported")

    def require(self, ok: bool, name: str, value: object, allowed: str) -> None:
        require(ok, f"{self.where}: {name}", value, allowed)

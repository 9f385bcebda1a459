"""Fp8Names: which matrices beside the experts are e4m3, by their names in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dp_runtime.weights.fp8_blocks import SCALE_SUFFIX
from dp_runtime.weights.loader import tensor_names

BESIDE_VISION = "language_model."  # in the names of a text model's tensors, at either end
ROOTS = ("model.", "mtp.")  # of a model's tensors and its draft layer's, not of other drafts


@dataclass(frozen=True)
class Fp8Names:
    """Those that files have scales of; without files, all but the modules that config.json lists.

    The default has none.
    """

    stored: frozenset[str] = frozenset()
    exempt: tuple[str, ...] | None = None

    def __contains__(self, name: object) -> bool:
        assert isinstance(name, str), name
        if self.exempt is None:
            return name in self.stored
        module = name.replace(BESIDE_VISION, "").removesuffix(".weight")
        return name.startswith(ROOTS) and not is_named(module, self.exempt)

    @classmethod
    def of_files(cls, directories: Iterable[str]) -> Fp8Names:
        names = {name for directory in directories for name in tensor_names(directory)}
        stored = {name.removesuffix(SCALE_SUFFIX) for name in names if name.endswith(SCALE_SUFFIX)}
        return cls(frozenset(name for name in stored if ".experts." not in name))


def is_named(module: str, names: Iterable[str]) -> bool:
    """Match a module, one around it, or the end of its name."""
    whole = f".{module}."
    return any(whole.startswith(f".{name}.") or whole.endswith(f".{name}.") for name in names)

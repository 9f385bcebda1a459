"""The models of the examples by name; all other models are directories."""

from __future__ import annotations

from pathlib import Path

from dp_runtime.errors import require


def example_models() -> dict[str, Path]:
    """The checkpoints of the examples by name: tiny_moe, say; an installed package has none."""
    found = Path(__file__).parents[2].glob("examples/*/checkpoint/config.json")
    return {file.parents[1].name: file.parent for file in sorted(found)}


def model_directory(model: str, home: Path = Path()) -> str:
    """Find the model of an example that is named; a directory of this name at home comes first."""
    examples = example_models()
    if Path(model).name != model or (home / model).exists() or not examples:
        return model
    require(model in examples, "model", model, f"a directory, or one of {', '.join(examples)}")
    return str(examples[model])

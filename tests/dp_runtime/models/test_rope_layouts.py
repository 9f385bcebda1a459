"""Rotary embedding in every combination of the old layout and the new one, as transformers has it.

Whatever config.json says is taken as transformers takes it, or refused with the names of both
fields; nothing is read and then dropped.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_runtime.layers.rotary import Rotary
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.registry import read_model_config
from tests.dp_runtime.models.config_shapes import MIXTRAL_8X7B, QWEN3_30B_A3B, Fields
from tests.dp_runtime.paged import CPU

YARN: Fields = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SECTIONS: dict[str, Any] = {
    "absent": ...,
    "null": None,
    "empty": {},
    "theta": {"rope_theta": 5e5},
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "yarn": YARN,
    "yarn, theta": YARN | {"rope_theta": 1e6},
    "old yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn 2": YARN | {"factor": 2.0},
    "partial yarn": {"rope_type": "yarn", "factor": 4.0},
    "linear": {"type": "linear", "factor": 2.0},
}
THETAS: dict[str, Any] = {"absent": ..., "1e6": 1e6, "3e4": 30_000}
LENGTHS = {"qwen": (..., 64), "mixtral": (...,)}
BASES = {"qwen": QWEN3_30B_A3B, "mixtral": MIXTRAL_8X7B}
FIELDS = ("rope_scaling", "rope_parameters", "rope_theta", "original_max_position_embeddings")
SIZES: Fields = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 1, "max_position_embeddings": 256, "max_window_layers": 1,
}  # fmt: skip


def transformers_rope(directory: Path) -> tuple[Tensor, float]:
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    config = transformers.AutoConfig.from_pretrained(directory)
    rotary = Qwen3MoeRotaryEmbedding(config)  # Mixtral's is the same
    return rotary.inv_freq, rotary.attention_scaling


def read(directory: Path) -> ModelConfig | str:
    """The configuration, or what is said against it."""
    try:
        return read_model_config(str(directory))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scaling", SECTIONS)
def test_every_combination_of_layouts(base: str, scaling: str, tmp_path: Path) -> None:
    rest = {name: value for name, value in BASES[base].items() if name not in FIELDS}
    taken = 0
    for parameters, theta, length in product(SECTIONS, THETAS, LENGTHS[base]):
        values = (SECTIONS[scaling], SECTIONS[parameters], THETAS[theta], length)
        rope = {name: v for name, v in zip(FIELDS, values, strict=True) if v is not ...}
        (tmp_path / "config.json").write_text(json.dumps(rest | SIZES | rope))
        config = read(tmp_path)
        if isinstance(config, str):
            assert sum(name in config for name in FIELDS) >= 2, f"{rope}: {config}"
            continue
        taken += 1
        inv_freq, scale = transformers_rope(tmp_path)
        ours = Rotary.from_config(config.rope, config.head_dim, CPU)
        torch.testing.assert_close(ours.inv_freq, inv_freq, msg=f"{rope}")
        assert ours.attention_factor == pytest.approx(scale), f"{rope}"
    assert taken > 10

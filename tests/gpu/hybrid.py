"""A tiny hybrid model with heads that kernels of GPUs serve, and an MTP layer that often agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.hybrid_checkpoints import add_mtp, agree_in_part, hybrid_checkpoint


def gpu_checkpoint(directory: Path, **overrides: Any) -> Path:
    """Save one whose heads of 256 and 128 are those of the published models."""
    sizes: dict[str, Any] = {
        "hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }  # fmt: skip
    path = hybrid_checkpoint(directory, **sizes | overrides)
    return agree_in_part(add_mtp(path))

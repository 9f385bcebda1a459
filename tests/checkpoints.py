"""Tiny random checkpoints for tests, written by transformers, the oracle they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {
        **SIZES,
        "head_dim": 16,
        "num_experts": 8,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "MixtralForCausalLM": {**SIZES, "num_local_experts": 4},
}


def tiny_checkpoint(
    directory: Path | str,
    architecture: str = "Qwen3MoeForCausalLM",
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Save a random float32 model of `architecture` into `directory` and return that directory.

    overrides: fields of its transformers config, over the sizes above. A given seed gives the same
    weights; they are so large that logits differ between tokens and positions, unlike those of the
    default initialisation, which repeats one token.
    """
    import transformers

    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**{**ARCHITECTURES[architecture], **overrides})
    model = model_class(config)
    randomize(model, seed)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Matrices N(0, 1.5 / sqrt(inputs)), norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5, generator=generator)
            else:
                mean = 0.0 if name.endswith("bias") else 1.0
                parameter.normal_(mean, 0.2, generator=generator)


def oracle(directory: Path | str) -> Any:
    """The checkpoint as a transformers model in float32, for comparison."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()

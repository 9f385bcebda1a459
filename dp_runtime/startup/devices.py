"""The choice of the device that the ranks of a config run on."""

from __future__ import annotations

from dataclasses import replace

import torch

from dp_runtime.config import EngineConfig


def resolve_device(config: EngineConfig, num_gpus: int, where: str) -> EngineConfig:
    """Replace "auto" by cuda if the ranks fit the GPUs, by cpu without any; else ValueError."""
    wanted = config.device
    if wanted == "auto":
        wanted = "cpu" if num_gpus == 0 else "cuda"
    if wanted == "cuda" and num_gpus == 0:
        raise ValueError(f"device: 'cuda' is not allowed; {where} has no GPU: set device='cpu'")
    if wanted == "cuda" and num_gpus * config.ranks_per_gpu < config.dp_size:
        needed = -(-config.dp_size // num_gpus)
        raise ValueError(
            f"dp_size: {config.dp_size} is not allowed; {where} has {num_gpus} GPUs "
            f"(device={config.device!r}, ranks_per_gpu={config.ranks_per_gpu}); lower dp_size, "
            f"set ranks_per_gpu={needed} or set device='cpu'"
        )
    return replace(config, device=wanted)


def use_device(device: str) -> None:
    if device != "cpu":
        torch.cuda.set_device(device)


def gpu_uuid(device: str) -> str:
    if device == "cpu":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)

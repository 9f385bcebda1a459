"""Which device the ranks of a config run on."""

from __future__ import annotations

from dataclasses import replace

from dp_runtime.config import EngineConfig


def resolve_device(config: EngineConfig, num_gpus: int, where: str) -> EngineConfig:
    """Replace device "auto": no GPU at all is cpu, at least dp_size GPUs are cuda.

    Raises ValueError, naming both numbers, if there are some GPUs but fewer than ranks.
    """
    wanted = config.device
    if wanted == "auto":
        wanted = "cpu" if num_gpus == 0 else "cuda"
    if wanted == "cuda" and num_gpus == 0:
        raise ValueError(f"device: 'cuda' is not allowed; {where} has no GPU: set device='cpu'")
    if wanted == "cuda" and num_gpus < config.dp_size:
        raise ValueError(
            f"dp_size: {config.dp_size} is not allowed; {where} has {num_gpus} GPUs "
            f"(device={config.device!r}); lower dp_size or set device='cpu'"
        )
    return replace(config, device=wanted)

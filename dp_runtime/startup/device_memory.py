"""How much memory a rank's device has, and how much of it is free."""

from __future__ import annotations

import psutil
import torch

# Beside what torch allocates: the CUDA context and kernels, NCCL's buffers, fragmentation.
CUDA_RESERVE = 2 << 30
CUBLAS_BYTES = 32 << 20  # its workspace on SM90 and later, which torch allocates and keeps


def rank_memory(device: str, dp_size: int, ranks_per_gpu: int) -> int:
    """Bytes that one rank may plan with; the same on every run, whatever is free.

    A GPU is shared by ranks_per_gpu ranks, a CPU's memory by all. Creates no CUDA context.
    """
    if device == "cpu":
        return int(psutil.virtual_memory().total) // dp_size
    total = torch.cuda.get_device_properties(torch.device(device)).total_memory
    return max(total // ranks_per_gpu - CUDA_RESERVE, 0)


def free_bytes(device: str) -> int:
    """Bytes of a GPU that no process uses."""
    return torch.cuda.mem_get_info(torch.device(device))[0]

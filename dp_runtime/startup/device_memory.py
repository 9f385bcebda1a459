"""The memory of a rank's device."""

from __future__ import annotations

import gc

import torch

from dp_runtime.host.limits import usable_memory

CUDA_RESERVE = 2 << 30  # for the CUDA context and kernels, NCCL's buffers, fragmentation
CUBLAS_BYTES = 32 << 20  # its workspace on SM90 and later, which torch allocates and keeps


def rank_memory(device: str, dp_size: int, ranks_per_gpu: int) -> int:
    """Share memory among ranks, the same on every run, whatever is free; needs no CUDA context."""
    if device == "cpu":
        return usable_memory() // dp_size
    total = torch.cuda.get_device_properties(torch.device(device)).total_memory
    return max(total // ranks_per_gpu - CUDA_RESERVE, 0)


def allocated_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free_bytes(device: str) -> int:
    return torch.cuda.mem_get_info(torch.device(device))[0]


def uncached_free_bytes(device: str) -> int:
    """Count what torch keeps for later allocations as free too; it is, after this."""
    torch.cuda.empty_cache()
    return free_bytes(device)


def free_garbage(device: str) -> None:
    """Give what nobody holds any more back, also to the device."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()

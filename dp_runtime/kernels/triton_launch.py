"""Launches of Triton kernels: cheap ones, overlapped starts, a device's multiprocessors.

With programmatic dependent launch a kernel starts while the one before it ends. Until it has called
`gdc_wait` it writes nothing, and reads only weights and what was written by a copy or by kernels
before the previous one. Every program calls gdc_wait, so when a kernel has finished, all earlier
kernels on the stream have finished too.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gdc_launch_dependents", "gdc_wait", "launch", "num_multiprocessors", "overlaps"]

_compiled: dict[tuple[Hashable, ...], CompiledKernel] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[object, ...],
    constants: Mapping[str, Hashable],
    **options: int | bool,
) -> None:
    """Launch a Triton kernel, from the second of a kind on without the 30-60 us of its look-up."""
    kind = (
        id(kernel), *(_kind(x) for x in arguments), *constants.values(), *options.items()
    )  # fmt: skip
    compiled = _compiled.get(kind)
    if compiled is not None:
        compiled[grid](*arguments, *constants.values())
        return
    found = kernel[grid](*arguments, **constants, **options)
    if isinstance(found, CompiledKernel):  # nothing was compiled for the interpreter
        names = kernel.arg_names[len(arguments) :]
        assert names == list(constants), f"{list(constants)} in the order of {names}"
        _compiled[kind] = found


def _kind(argument: object) -> Hashable:
    """Name what Triton compiles a kernel for; at least as fine as its own distinctions."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.get_device(), argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, argument.bit_length() > 31
    return type(argument).__name__


@cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: its programs take several tiles too
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9  # has PDL

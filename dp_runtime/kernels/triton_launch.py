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
    """Launch a Triton kernel, from the second of a kind on without the 30-60 us of its look-up.

    A compiled kernel takes addresses: of each tensor it would ask the driver whose it is.
    """
    first = arguments[0]
    assert isinstance(first, Tensor), "a kernel's first argument is a tensor"
    kind: list[Hashable] = [id(kernel), first.get_device(), *constants.values(), *options.items()]
    plain = list[object]()
    for argument in arguments:
        value = argument
        if isinstance(argument, Tensor):
            value = argument.data_ptr()
            kind += (argument.dtype, value % 16 == 0)
        elif isinstance(argument, int):
            kind.append(_kind(argument))
        else:
            kind.append(type(argument).__name__)
        plain.append(value)
    compiled = _compiled.get(tuple(kind))
    if compiled is not None:
        compiled[grid](*plain, *constants.values())
        return
    found = kernel[grid](*arguments, **constants, **options)
    if isinstance(found, CompiledKernel):  # nothing was compiled for the interpreter
        names = list(kernel.arg_names[len(arguments) :])
        assert names == list(constants), f"{list(constants)} in the order of {names}"
        _compiled[tuple(kind)] = found


def _kind(number: int) -> Hashable:
    """Name what Triton compiles a kernel for; at least as fine as its own distinctions."""
    return type(number), number % 16 == 0, number == 1, number.bit_length() > 31


@cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: its programs take several tiles too
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9  # has PDL

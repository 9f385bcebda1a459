"""Which launches go to a compiled kernel without Triton's look-up; stand-ins for both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels import triton_launch
from dp_runtime.kernels.triton_launch import launch

GRID, WHOLE = (1, 2, 3), torch.zeros(64)


@dataclass
class Compiled:
    """Stands in for what Triton compiled: how it was launched."""

    launches: list[tuple[object, ...]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.launches.append((grid, *arguments))


@dataclass
class Kernel:
    """Stands in for a Triton kernel: everything it compiled."""

    arg_names: tuple[str, ...] = ("x", "maybe", "size", "eps", "BLOCK", "PDL")
    compiled: list[Compiled] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return self._compile

    def _compile(self, *arguments: object, **named: object) -> Compiled:
        self.compiled.append(Compiled())
        return self.compiled[-1]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(triton_launch, "_compiled", {})
    return Kernel()


def call(
    kernel: Kernel, x: Tensor = WHOLE, maybe: Tensor | None = None, size: int = 48,
    block: int = 16, warps: int = 4,
) -> None:  # fmt: skip
    constants = {"BLOCK": block, "PDL": False}
    launch(kernel, GRID, (x, maybe, size, 1e-6), constants, num_warps=warps)


def test_the_second_launch_of_a_kind_goes_to_the_compiled_kernel(kernel: Kernel) -> None:
    other = torch.zeros(8)
    call(kernel)
    call(kernel, other, size=64)
    assert len(kernel.compiled) == 1
    passed = (other.data_ptr(), None, 64, 1e-6)
    assert kernel.compiled[0].launches == [(GRID, *passed, 16, False)]


@pytest.mark.parametrize(
    "other",
    [
        {"x": WHOLE[1:]}, {"x": WHOLE.double()}, {"maybe": WHOLE}, {"size": 1}, {"size": 50},
        {"size": 2**35}, {"block": 32}, {"warps": 8},
    ],
    ids=["unaligned", "another dtype", "not None", "one", "no sixteens", "64 bits", "constant",
         "option"],
)  # fmt: skip
def test_another_kind_does_not(kernel: Kernel, other: dict[str, Any]) -> None:
    call(kernel)
    call(kernel, **other)
    assert [len(of.launches) for of in kernel.compiled] == [0, 0]
    call(kernel, **other)
    assert [len(of.launches) for of in kernel.compiled] == [0, 1]


def test_constants_are_named_in_the_kernel_s_order(kernel: Kernel) -> None:
    kernel.arg_names = (*kernel.arg_names[:4], "PDL", "BLOCK")
    with pytest.raises(AssertionError, match="in the order of"):
        call(kernel)

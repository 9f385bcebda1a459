"""Compiles the kernels of gated delta nets for an SM90, which takes no GPU.

    TRITON_INTERPRET=0 python -m tests.dp_runtime.kernels.gated_delta.compile_all

The interpreter takes programs that the compiler refuses. Prints each kernel and its shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dp_runtime.kernels import slot_copy
from dp_runtime.kernels.gated_delta import chunked, convolution, gated_norm, recurrent
from dp_runtime.kernels.gated_delta.rows import HeadShape
from tests.dp_runtime.kernels.gated_delta.oracle import Caches, Net, Rows, run, sequences_of

TARGET = GPUTarget("cuda", 90, 32)
MAX_SHARED = 227 * 1024  # bytes that a program may have there
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv", int: "i32", float: "fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A kernel that is compiled when it is launched, and not run."""

    kernel: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *arguments: object, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        values = dict(zip(self.kernel.arg_names, arguments)) | named
        types, constants, hints = dict[str, str](), dict[tuple[int], object](), {}
        for index, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                types[parameter.name], constants[index,] = "constexpr", value
                continue
            types[parameter.name] = type_of(value)
            if isinstance(value, Tensor) or _is_sixteens(value, parameter):
                hints[index,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, types, constants, hints)
        shared = triton.compile(source, target=TARGET, options=options).metadata.shared
        print(f"{self.kernel.__name__}: {shared} bytes", flush=True)
        assert shared <= MAX_SHARED, f"{self.kernel.__name__} takes {shared} bytes"


def _is_sixteens(value: object, parameter: Any) -> bool:
    return isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize


def type_of(value: object) -> str:
    if isinstance(value, TensorDescriptor):
        shape = ",".join(map(str, value.block_shape))
        return f"tensordesc<{TYPES[value.base.dtype][1:]}[{shape}]>"
    return TYPES[value.dtype if isinstance(value, Tensor) else type(value)]


def main() -> None:
    for module in (convolution, recurrent, chunked, gated_norm, slot_copy):
        instead: dict[str, object] = {"overlaps": lambda device: True}
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                instead[name] = Compiled(value)
        for name, other in instead.items():
            setattr(module, name, other)
    for shape in (HeadShape(16, 64, 128, 128), HeadShape(1, 2, 32, 24)):
        for max_drafts in (0, 3):
            net = Net.draw(shape, 4, torch.bfloat16)
            caches = Caches.dirty(net, 4, max_drafts)
            drafts = ([0, 3], [0, 0]) if max_drafts else None
            for tracks in (None, ([3, 0], [64, 0])):
                of = sequences_of([70, 4], [1, 2], [True, True], drafts, tracks)
                out = run(net, Rows.draw(shape, 74, torch.bfloat16), caches, of)
        gated_norm.gated_rms_norm(out, out.flatten(1), torch.ones(shape.head_v_dim), 1e-6)
    table = slot_copy.slot_table([caches.windows, caches.states])
    slot_copy.copy_slots(*table, torch.tensor([[1, 2]]))


if __name__ == "__main__":
    main()

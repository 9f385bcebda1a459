"""Compile and load a rank's kernels before it is ready, and never after."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import NoReturn

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JitModule:
    """A module that `build` compiles on first use and loads into this process."""

    name: str  # unique
    build: Callable[[], object]
    by_triton: bool = False  # whose compiler is for one thread


def in_one_thread(modules: Sequence[JitModule]) -> tuple[JitModule, ...]:
    """Make one module of those that Triton compiles."""
    triton = [module for module in modules if module.by_triton]
    others = tuple(module for module in modules if not module.by_triton)
    if not triton:
        return others

    def build() -> None:
        for module in triton:
            module.build()

    return (*others, JitModule(", ".join(module.name for module in triton), build, by_triton=True))


class KernelBuilds:
    """Builds in threads while other work goes on; flashinfer's file locks let ranks share files."""

    def __init__(self, kernels: Sequence[JitModule], device: torch.device) -> None:
        self.total = len(kernels)
        self._kernels = kernels
        self._device = device
        self._pool = ThreadPoolExecutor(max(1, len(kernels)), initializer=self._use_device)
        self._builds: dict[Future[object], JitModule] = {}

    @property
    def num_built(self) -> int:
        return sum(build.done() for build in tuple(self._builds))

    def wait(self) -> None:
        """Return once all are loaded; RuntimeError names the first that can't be."""
        for build in as_completed(self._builds):
            error = build.exception()
            if error is not None:
                raise RuntimeError(f"kernel {self._builds[build].name}: {error}")
        if self._builds:
            logger.info("kernels built: %s", ", ".join(kernel.name for kernel in self._kernels))

    def __enter__(self) -> KernelBuilds:
        self._builds = {self._pool.submit(kernel.build): kernel for kernel in self._kernels}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _use_device(self) -> None:
        """NOTE: loading a module sets attributes of its kernels on the thread's current device."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)


def forbid_compilation() -> None:
    """Make a kernel that was not built an error from now on, instead of a long pause."""
    os.environ["FLASHINFER_DISABLE_JIT"] = "1"
    if find_spec("triton") is not None:
        from triton import knobs

        knobs.runtime.jit_cache_hook = _refuse


def allow_compilation() -> None:
    os.environ.pop("FLASHINFER_DISABLE_JIT", None)
    if find_spec("triton") is not None:
        from triton import knobs

        knobs.runtime.jit_cache_hook = None


def _refuse(*, repr: str, **call: object) -> NoReturn:
    """Triton calls this before it compiles a kernel or loads a compiled one."""
    raise RuntimeError(f"the Triton kernel {repr} was not built before the rank was ready")

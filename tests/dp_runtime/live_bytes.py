"""LiveBytes: how many bytes of tensors are alive, and were at most, in the code under it."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators of this thread return, while they live.

    What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[StorageWeakRef, int] = {}

    @property
    def now(self) -> int:
        self._live = {ref: size for ref, size in self._live.items() if not ref.expired()}
        return sum(self._live.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        old = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs))
               if isinstance(t, torch.Tensor)}  # fmt: skip
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref not in old:
                    self._live[ref] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self.now)
        return result

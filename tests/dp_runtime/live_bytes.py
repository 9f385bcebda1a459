"""LiveBytes: how many bytes of tensors are alive, and were at most, in the code under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from collectives.in_process import InProcessCollective
from dp_runtime.attention import torch_ref
from dp_runtime.attention.plan import LayerCache
from dp_runtime.attention.torch_ref import QueryPlan


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


def exchange_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a rank go on after an exchange only when no other rank holds the rows that it brought.

    Those rows are the bringer's own storage: a slow reader would add them to its later peaks.
    """

    def in_step(exchange: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(collective: InProcessCollective, *arguments: Any) -> Tensor:
            result = exchange(collective, *arguments)
            collective.barrier()
            return result

        return run

    for exchange in (InProcessCollective.all_gather, InProcessCollective.reduce_scatter):
        monkeypatch.setattr(InProcessCollective, exchange.__name__, in_step(exchange))


def attend_frugally(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch_ref copy what it gets, as a GPU's kernels do; its masks would take far more."""

    def attend(plan: QueryPlan, q: Tensor, cache: LayerCache, out: Tensor | None = None) -> Tensor:
        assert out is None, "a layer has it allocate"
        keys_and_values = q.new_empty(len(q), 2 * cache.pool.shape[2], q.shape[2])
        copies = q.clone(), keys_and_values
        return copies[0].clone()

    monkeypatch.setattr(torch_ref, "build_groups", lambda *arguments: ())
    monkeypatch.setattr(QueryPlan, "attend", attend)

"""StateCopies: recurrent states that go from slot to slot, between the passes of steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.cache_spec import LayerState
from dp_runtime.core.device_copy import all_on_device
from dp_runtime.core.recurrent_metadata import AcceptedDrafts
from dp_runtime.scheduler.scheduler_output import StateCopy, StateMoves


class StateCopies:
    """Copies whole slots of all layers in the order of the device's stream, in one launch there."""

    def __init__(
        self, states: Sequence[LayerState], accepted: AcceptedDrafts | None, device: torch.device
    ) -> None:
        self._tensors = [tensor for state in states for tensor in state]
        self._accepted, self._device = accepted, device
        self._table: tuple[Tensor, int] | None = None
        if device.type == "cuda" and self._tensors:
            from dp_runtime.kernels.slot_copy import slot_table

            self._table = slot_table(self._tensors)

    def before(self, moves: StateMoves) -> None:
        """Copy what a step's requests go on from, before its passes."""
        self._run(moves.donated)
        self._run([restore.copy for restore in moves.restored])

    def after(self, moves: StateMoves) -> None:
        """Copy what a step leaves for others, before the next step goes on from it."""
        self._run([track.copy for track in moves.tracks if not track.num_rows])

    def _run(self, copies: Sequence[StateCopy]) -> None:
        """Copy slots; no two copies go to one slot, and none comes from where another goes."""
        if not copies:
            return
        pairs = np.array([(each.source, each.target) for each in copies], np.int64)
        counts = np.array([each.num_accepted for each in copies], np.int32)
        slots, accepted = all_on_device((pairs, counts), self._device)
        if self._table is None:
            for tensor in self._tensors:
                tensor[slots[:, 1]] = tensor[slots[:, 0]]
        else:
            from dp_runtime.kernels.slot_copy import copy_slots

            copy_slots(*self._table, slots)
        if self._accepted is not None:
            self._accepted.write(slots[:, 1], accepted)

"""HostCopies: the memory of this host in which ranks keep their weights for their successors."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence

from dp_runtime.core.membership import Membership
from dp_runtime.errors import require
from dp_runtime.host.memory_address import MemoryAddress
from dp_runtime.weights.host_copy import CopyMemory


class HostCopies:
    """Belongs to the driver, which outlives ranks; without `wanted` it has none."""

    def __init__(self, wanted: bool) -> None:
        ok = sys.platform == "linux" or not wanted
        require(ok, "host_weights", wanted, "False but on Linux")
        self._wanted = wanted
        self._copies: dict[tuple[int, Membership], CopyMemory] = {}
        self._lock = threading.Lock()

    def addresses(
        self, dp_ranks: Sequence[int], members: Membership
    ) -> Mapping[int, MemoryAddress]:
        """Return where these ranks find their copies, which are new and empty if unfinished."""
        if not self._wanted:
            return {}
        with self._lock:
            stale = {
                (dp_rank, of): copy
                for (dp_rank, of), copy in self._copies.items()
                # NOTE: a rank that was lost as it filled its copy may have left anything in there.
                if of != members or (dp_rank in dp_ranks and not copy.is_finished)
            }
            for key, copy in stale.items():
                del self._copies[key]
                copy.close()
            for dp_rank in dp_ranks:
                if (dp_rank, members) not in self._copies:
                    self._copies[dp_rank, members] = CopyMemory()
            return {rank: self._copies[rank, members].address for rank in dp_ranks}

    def close(self) -> None:
        with self._lock:
            copies, self._copies = self._copies, {}
        for copy in copies.values():
            copy.close()

"""PageEvents: pages that enter and leave a prefix cache, and states behind them, as KV events."""

from __future__ import annotations

import numpy as np

from dp_runtime.core.rank_events.kv_events import (
    BlockRemoved,
    BlockStored,
    PendingKvEvents,
    StateRemoved,
    StateStored,
)


class PageEvents:
    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self.pending = PendingKvEvents()

    def stored(self, digest: bytes, parent: bytes | None, content: bytes) -> None:
        """Tell of a page; content: its tokens as little-endian int32, perhaps with the next one."""
        tokens = np.frombuffer(content, "<i4")[: self._page_size].tolist()
        self.pending.add([BlockStored((digest,), parent, tuple(tokens), self._page_size)])

    def removed(self, digest: bytes) -> None:
        self.pending.add([BlockRemoved((digest,))])

    def state_changed(self, digest: bytes, is_there: bool) -> None:
        """Tell of a recurrent state behind a page."""
        self.pending.add([(StateStored if is_there else StateRemoved)((digest,))])

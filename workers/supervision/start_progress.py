"""The progress bars of a start."""

from __future__ import annotations

from collections.abc import Sequence

from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.status import RankHealth


def show_loading(bar: ProgressBar, ranks: Sequence[RankHealth]) -> None:
    """Show how much is read, and the kernels: ranks build the same ones and share the files."""
    total = max((rank.kernels_total for rank in ranks), default=0)
    built = min((rank.kernels_built for rank in ranks), default=0)
    loaded = sum(rank.bytes_loaded for rank in ranks)
    kernels = f"kernels {built}/{total}" if total else ""
    bar.update(loaded, sum(rank.bytes_total for rank in ranks), kernels)


def show_capture(bar: ProgressBar, ranks: Sequence[RankHealth]) -> None:
    captured = min((rank.graphs_captured for rank in ranks), default=0)
    bar.update(captured, max((rank.graphs_total for rank in ranks), default=0))

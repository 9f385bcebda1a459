"""Exports an engine's metrics again and again, for as long as the engine is held and open."""

from __future__ import annotations

import threading
import weakref
from time import sleep
from typing import Protocol

EXPORT_EVERY_S = 5.0


class Exporting(Protocol):
    def export_metrics(self) -> bool: ...  # False: it is closed


def export_periodically(engine: Exporting) -> None:
    threading.Thread(
        target=_run, args=(weakref.ref(engine),), name="export-metrics", daemon=True
    ).start()


def _run(reference: weakref.ref[Exporting]) -> None:
    while _export(reference()):
        sleep(EXPORT_EVERY_S)


def _export(engine: Exporting | None) -> bool:
    return engine is not None and engine.export_metrics()

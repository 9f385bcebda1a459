"""The clock of recorders."""

from tests.dp_runtime.flight.flights import clock

__all__ = ["clock"]

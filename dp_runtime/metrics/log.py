"""Where the log goes; in a user's program, wherever that program sends it."""

from __future__ import annotations

import logging
import sys

LOGGERS = ("dp_runtime", "workers", "collectives")
CLEAR_LINE = "\r\x1b[K"  # else a line would begin at the end of a progress bar


def log_to_stderr(level: str, dp_rank: int | None = None) -> None:
    """Show the log on stderr, in processes of the runtime: its command line and its ranks."""
    handler = logging.StreamHandler()
    source = "" if dp_rank is None else f"rank {dp_rank} "
    start = CLEAR_LINE if sys.stderr.isatty() else ""
    text = f"{start}{source}%(levelname)s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(text))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False

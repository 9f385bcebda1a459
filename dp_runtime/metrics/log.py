"""Where the runtime's log goes. As a library it only writes to its loggers, as any library does."""

from __future__ import annotations

import logging
import sys

LOGGERS = ("dp_runtime", "workers", "collectives")
CLEAR_LINE = "\r\x1b[K"  # else a line would begin at the end of a progress bar


def log_to_stderr(level: str, dp_rank: int | None = None) -> None:
    """Show the log from `level` on, on stderr; lines of a rank begin with its number.

    For processes that belong to the runtime: its command line and its ranks.
    """
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

"""What the children of a fork server do in its tests."""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection, wait


def tell(channel: Connection, driver: int) -> None:
    """Say where and as what this process runs, then obey: exit, or wait for the driver's end."""
    channel.send(
        {
            "pid": os.getpid(),
            "server": os.getppid(),
            "leads_session": os.getsid(0) == os.getpid(),
            "directory": os.getcwd(),
            "variable": os.environ.get("DP_RUNTIME_TEST"),
            "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
            "main": getattr(sys.modules["__main__"], "__file__", ""),
            "torch": "torch" in sys.modules,
            "threads": threading.active_count(),
        }
    )
    if driver not in wait([channel, driver]):
        os._exit(channel.recv())

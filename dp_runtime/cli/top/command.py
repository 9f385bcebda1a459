"""The command `top`."""

from __future__ import annotations

import argparse
from contextlib import suppress
from importlib.util import find_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    url, seconds = "http://127.0.0.1:8000", 2.0
    parser.add_argument("--url", default=url, help=f"server to watch (default: {url})")
    parser.add_argument(
        "--interval", type=float, default=seconds, metavar="SECONDS",
        help=f"time between looks, which rates are of (default: {seconds:g})",
    )  # fmt: skip
    parser.add_argument(
        "--once", action="store_true",
        help="print one table and end, as without a terminal; 1 if the server does not answer",
    )  # fmt: skip


def top(options: argparse.Namespace) -> None:
    """Watch the ranks of a running server."""
    if find_spec("rich") is None or find_spec("prometheus_client") is None:
        raise ValueError("top needs the extra 'serve': pip install 'dp-runtime[serve]'")
    from rich.console import Console

    from dp_runtime.cli.top.watcher import Watched, Watcher

    watcher = Watcher(Watched(options.url.rstrip("/"), options.interval))
    console = Console(highlight=False)
    if options.once or not console.is_terminal:
        console.print(watcher.once())
    else:
        with suppress(KeyboardInterrupt):  # how one stops watching
            watcher.watch(console)

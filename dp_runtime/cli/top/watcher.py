"""Watcher: looks at one server again and again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import sleep
from urllib.parse import urlsplit

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from dp_runtime.cli.top.rates import Interval
from dp_runtime.cli.top.scrape import Scrape
from dp_runtime.cli.top.view import View
from dp_runtime.errors import ServerSilent, require

RECENT_S = 60.0  # percentiles are of as much, if it has been watched for so long


@dataclass(frozen=True)
class Watched:
    url: str
    interval_s: float  # between looks

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname)
        require(ok, "url", self.url, "such as http://127.0.0.1:8000")
        require(0.1 <= self.interval_s <= 3600, "interval", self.interval_s, "seconds in 0.1..3600")


class Watcher:
    """Makes pictures of a server from what it says now and said before."""

    def __init__(self, watched: Watched, scrape: Callable[[str], Scrape] = Scrape.of) -> None:
        self._watched, self._scrape = watched, scrape
        self._scrapes: deque[Scrape] = deque()

    def once(self) -> RenderableType:
        """Return rates of one interval and percentiles since the start; or raise ServerSilent."""
        url = self._watched.url
        first = self._scrape(url)
        sleep(self._watched.interval_s)
        last = self._scrape(url)
        return View(url, Interval(first, last), Interval(None, last))

    def look(self) -> RenderableType:
        """Return the next picture, or the one line that says why there is none."""
        url, seen = self._watched.url, self._scrapes
        try:
            last = self._scrape(url)
        except ServerSilent as error:
            seen.clear()
            return Text(f"{error}; asking again every {self._watched.interval_s:g} s", "bold red")
        while seen and last.at - seen[0].at > RECENT_S:
            seen.popleft()
        before, oldest = (seen[-1], seen[0]) if seen else (None, None)
        seen.append(last)
        return View(url, Interval(before, last), Interval(oldest, last))

    def watch(self, console: Console) -> None:
        """Show pictures in one place, until it is interrupted."""
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(self.look(), refresh=True)
                sleep(self._watched.interval_s)

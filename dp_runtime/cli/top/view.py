"""What `top` shows: the server, the ranks, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from dp_runtime.cli.top.columns import count, milliseconds, rank_table, rate
from dp_runtime.cli.top.rates import Interval, RankRow

WIDE = 120  # columns of a terminal that has room for full titles
STATUS_STYLES = {"ok": "green", "starting": "yellow", "paused": "yellow", "draining": "yellow"}
TIMES = {"first token": "first_token", "between tokens": "inter_token"}


@dataclass(frozen=True)
class View:
    """One picture: rates of `interval`, percentiles of `recent`, which is longer."""

    url: str
    interval: Interval
    recent: Interval

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = [RankRow.of(self.interval, rank) for rank in self.interval.last.dp_ranks]
        yield self._server(len(rows))
        yield self._load()
        yield self._times()
        yield Text()
        yield rank_table(rows, options.max_width >= WIDE)
        yield from self._errors()

    def _server(self, num_ranks: int) -> Text:
        last = self.interval.last
        names = {sample.labels["model_name"] for sample in last.samples["vllm:prompt_tokens_total"]}
        status = str(last.health.get("status", "unknown"))
        epoch = last.sum("dp_runtime_epoch", dp_rank=last.dp_ranks[0])
        num_warm = last.sum("dp_runtime_standbys_warm")
        standbys = f"{num_warm:.0f} standbys, " if num_warm else ""
        return Text.assemble(
            (", ".join(names), "bold"), f" at {self.url}: ",
            (status, STATUS_STYLES.get(status, "bold red")),
            f", {num_ranks} ranks, {standbys}epoch {epoch:.0f}",
        )  # fmt: skip

    def _load(self) -> Text:
        interval, last = self.interval, self.interval.last
        running, queued = (
            last.sum(f"dp_runtime_requests_{kind}") for kind in ("running", "queued")
        )
        ended, output, prompt = (
            rate(interval.per_s(f"dp_runtime_{name}_total"))
            for name in ("requests_ended", "output_tokens", "prompt_tokens")
        )
        return Text(
            f"requests: {count(running)} running, {count(queued)} queued, {ended} ended/s\n"
            f"tokens/s: {output} output, {prompt} prompt"
        )

    def _times(self) -> Text:
        times = [
            f"{title} {self._percentile(name, 0.5)} / {self._percentile(name, 0.99)}"
            for title, name in TIMES.items()
        ]
        return Text(f"p50 / p99 in ms, {self._since}: {', '.join(times)}")

    @property
    def _since(self) -> str:
        seconds = self.recent.seconds
        return "since start" if seconds is None else f"last {seconds:.0f} s"

    def _percentile(self, name: str, share: float) -> str:
        return milliseconds(self.recent.quantile(f"dp_runtime_{name}_seconds", share))

    def _errors(self) -> Iterator[Text]:
        for rank in self.interval.last.health.get("ranks", ()):
            if error := rank.get("error"):
                name = f"rank {rank.get('dp_rank')}: "
                yield Text(name + str(error).removeprefix(name), "red")

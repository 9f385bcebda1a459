"""The columns of the table of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from dp_runtime.cli.top.rates import RankRow

OLD_STEP_S = 5.0
STYLES = {"running": "green", "idle": "cyan", "capturing": "yellow"}  # any other state is not good


@dataclass(frozen=True)
class Column:
    short: str  # title and unit, for a narrow terminal
    title: str
    show: Callable[[RankRow], str | Text]
    justify: Literal["left", "right"] = "right"


def rank_table(rows: list[RankRow], wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0))
    for column in COLUMNS:
        title = Text(column.title if wide else column.short, "bold", justify=column.justify)
        table.add_column(title, justify=column.justify, no_wrap=True)
    for row in rows:
        table.add_row(*(column.show(row) for column in COLUMNS))
    return table


def count(value: float) -> str:
    return f"{value:,.0f}"


def rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:,.0f}" if value >= 0.1 else f"{value * 1e3:.1f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f}"


def mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _state(row: RankRow) -> Text:
    return Text(row.state, STYLES.get(row.state, "bold red"))


def _waits_for(row: RankRow) -> str:
    return "self" if row.waits_for == row.dp_rank else row.waits_for or "-"


def _age(row: RankRow) -> Text:
    seconds = row.last_step_age_s
    late = row.state != "idle" and seconds > OLD_STEP_S
    text = f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return Text(text, "bold red" if late else "")


COLUMNS = (
    Column("rank\n", "rank\n", lambda row: row.dp_rank, "left"),
    Column("state\n", "state\n", _state, "left"),
    Column("run\n", "running\nrequests", lambda row: count(row.running)),
    Column("queue\n", "queued\nrequests", lambda row: count(row.queued)),
    Column("output\ntok/s", "output\ntokens/s", lambda row: rate(row.output_per_s)),
    Column("step\nms", "mean step\nms", lambda row: milliseconds(row.step_s)),
    Column("wait\n%", "wait\n% of step", lambda row: percent(row.wait_share)),
    Column("for\nrank", "waits most\nfor rank", _waits_for),
    Column("KV\n%", "KV pages\n% in use", lambda row: percent(row.kv_share)),
    Column("hit\n%", "cached\n% of prefixes", lambda row: percent(row.hit_share)),
    Column("pre-\nempt", "preempted\nrequests", lambda row: count(row.preemptions)),
    Column("pad\n%", "padding\n% of rows", lambda row: percent(row.padding_share)),
    Column("acc.\nlen", "accepted\ndrafts", lambda row: mean(row.accepted)),
    Column("last\nstep", "last step\nago", _age),
)

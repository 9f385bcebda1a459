"""The columns of results, with units and texts; docs/experiments.md has the same table."""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    name: str
    unit: str
    doc: str


PERCENTILES = (50, 90, 99)
LATENCIES = {
    "ttft": "from a request's submission to its first token",
    "tpot": "a request's mean time for a token after the first",
    "itl": "between tokens of a request",
    "e2e": "from a request's submission to its last token",
}
COLUMNS = (
    Column("duration_s", "s", "from the start to the last token"),
    Column("requests", "", "that were asked"),
    Column("failed_requests", "", "that were not answered"),
    Column("prompt_tokens", "tokens", "of all requests"),
    Column("output_tokens", "tokens", "of all requests"),
    Column("output_tok_s", "tokens/s", "output tokens over the duration"),
    Column("requests_s", "1/s", "answers over the duration"),
    *(
        Column(f"{name}_ms_p{percent}", "ms", f"{text}, {percent}th percentile")
        for name, text in LATENCIES.items()
        for percent in PERCENTILES
    ),
    Column("late_ms_p99", "ms", "that requests were asked too late by the driver"),
    Column("good_share", "", "requests that kept the SLO, of all"),
    Column("goodput_requests_s", "1/s", "those over the duration"),
    Column("steps", "", "that all ranks took"),
    Column("step_ms_p50", "ms", "a rank's step, waits included, median"),
    Column("step_ms_p99", "ms", "the same, 99th percentile"),
    Column("padding_waste", "", "1 - real rows / gathered rows"),
    Column("row_balance", "", "mean rows of a rank / rows of the largest rank"),
    Column("wire_rows", "rows", "that reached another rank"),
    Column("preemptions", "", "of requests, for want of pages"),
    Column(
        "prefix_hit_rate", "", "tokens found in the prefix cache, of all since the ranks' start"
    ),
    Column("drafts_proposed", "tokens", "by the draft model"),
    Column("tokens_per_verification", "tokens", "accepted drafts and one more, on average"),
    Column("recoveries", "", "new epochs, those of planned changes too"),
    Column("recovery_s", "s", "longest time between two steps with an epoch's begin between them"),
)
RANK_COLUMNS = (
    Column("busy_s", "s", "of the rank's steps, without waits"),
    Column("wait_s", "s", "of the rank for slower ones"),
    Column("output_tokens", "tokens", "of the rank"),
    Column("requests", "", "that ended on the rank"),
)


def unit_of(name: str) -> str:
    """Return the unit of a column, also of one of a rank, such as busy_s_0."""
    known = {column.name: column.unit for column in (*RANK_COLUMNS, *COLUMNS)}
    return known.get(name, known.get(name.rpartition("_")[0], ""))


def columns_page() -> str:
    """Return the table of docs/experiments.md, whose test compares it."""
    ranks = [column._replace(name=f"{column.name}_0, _1, ...") for column in RANK_COLUMNS]
    rows = [f"| `{name}` | {unit} | {doc} |" for name, unit, doc in (*COLUMNS, *ranks)]
    return "\n".join(("| figure | unit | |", "|---|---|---|", *rows, ""))

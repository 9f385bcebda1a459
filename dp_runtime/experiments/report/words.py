"""Figures in plain words: titles, units, and whether more is better."""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    title: str
    unit: str
    better: str  # "higher", "lower", or "" where neither is


FIGURES = {
    "output_tok_s": Words("Output tokens a second", "tokens/s", "higher"),
    "goodput_requests_s": Words("Requests a second that kept the SLO", "requests/s", "higher"),
    "good_share": Words("Requests that kept the SLO", "share of all requests", "higher"),
    "ttft_ms_p50": Words("Time to the first token, median", "ms", "lower"),
    "ttft_ms_p99": Words("Time to the first token, p99", "ms", "lower"),
    "tpot_ms_p50": Words("Time for each later token, median", "ms", "lower"),
    "tpot_ms_p99": Words("Time for each later token, p99", "ms", "lower"),
    "itl_ms_p99": Words("Gap between tokens, p99", "ms", "lower"),
    "e2e_ms_p50": Words("Whole request, median", "ms", "lower"),
    "e2e_ms_p99": Words("Whole request, p99", "ms", "lower"),
    "step_ms_p50": Words("A step, median", "ms", "lower"),
    "step_ms_p99": Words("A step, p99", "ms", "lower"),
    "padding_waste": Words("Padding among the rows that were computed", "share of rows", "lower"),
    "row_balance": Words("Balance of rows between ranks", "1: all ranks alike", "higher"),
    "wire_rows": Words("Rows sent to other ranks", "rows", ""),
    "prefix_hit_rate": Words("Prompt tokens found in the prefix cache", "share", "higher"),
    "tokens_per_verification": Words("Tokens for each verification of drafts", "tokens", "higher"),
    "preemptions": Words("Preemptions for want of pages", "requests", "lower"),
    "recoveries": Words("Recoveries and planned changes", "epochs", ""),
    "failed_requests": Words("Requests without an answer", "requests", "lower"),
    "steps": Words("Steps that all ranks took", "steps", ""),
    "duration_s": Words("Duration", "s", ""),
}
LATENCIES = {
    "ttft": ("Time to the first token (TTFT)", "From asking to the first token:", "requests"),
    "tpot": ("Time for each later token (TPOT)", "A request's mean after its first:", "requests"),
    "itl": ("Gap between tokens (ITL)", "From each token of a request to its next:", "tokens"),
    "e2e": ("Whole request (e2e)", "From asking to the last token:", "requests"),
}

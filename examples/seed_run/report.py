"""The report: figures of runs side by side, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from examples.seed_run.run import Counters, Run
from examples.seed_run.workload import Chat

SHOWN_FAULTS = 20
Figures = dict[str, Any]


def figures_of(run: Run) -> Figures:
    """Return what a client and what the ranks have seen, by name."""
    counted = {} if run.counted is None else _counted(Counters(run.counted, run.loss))
    return _answered(run) | counted


def _answered(run: Run) -> Figures:
    answers = [answer for answer in run.answers if not answer.error]
    seconds = [answer.seconds for answer in answers] or [0.0]
    prompts = [answer.prompt_tokens for answer in answers] or [0]
    outputs = [len(answer.token_ids) for answer in answers] or [0]
    right = run.is_right
    return {
        "chats": len(run.chats),
        "answered": len(answers),
        "right": sum(right),
        "accuracy": fmean(right),
        "accuracy by kind of question": _by_kind(run.chats, right),
        "images": sum(chat.num_images for chat in run.chats),
        "most in flight": run.most_in_flight,
        "prompt tokens": sum(prompts),
        "prompt tokens, most of a chat": max(prompts),
        "output tokens": sum(outputs),
        "output tokens, most of a chat": max(outputs),
        "output tokens per second": sum(outputs) / run.seconds,
        "seconds": run.seconds,
        "seconds until an answer, p50": float(np.percentile(seconds, 50)),
        "seconds until an answer, p99": float(np.percentile(seconds, 99)),
    }


def _counted(counters: Counters) -> Figures:
    return {
        "steps of a rank": counters.mean("steps_total"),
        "steps of a rank without rows of its own": counters.mean("idle_steps_total"),
        "preemptions": counters.total("preemptions_total"),
        "padding waste": 1 - counters.ratio("real_rows_total", "gathered_rows_total"),
        "accepted length": 1 + counters.ratio("drafts_accepted_total", "verifications_total"),
        "share found in the prefix cache": counters.ratio(
            "prefix_cache_hits_total", "prefix_cache_queries_total"
        ),
        "seconds of a rank": counters.by("step_phase_seconds_total", "phase"),
        "passes of a rank": counters.by("passes_total", "pass", "mode"),
    }


def _by_kind(chats: Sequence[Chat], right: Sequence[bool]) -> dict[str, float]:
    kinds: dict[str, list[bool]] = defaultdict(list)
    for chat, is_right in zip(chats, right, strict=True):
        kinds[chat.kind].append(is_right)
    return {kind: fmean(each) for kind, each in sorted(kinds.items())}


def write_report(path: Path, runs: Sequence[Run], faults: Sequence[str]) -> str:
    """Write `path`.json and `path`.md, and return the latter's text."""
    figures = [figures_of(run) for run in runs]
    told = [
        {"title": run.title, "flags": [*run.flags], "loss": _loss(run)} | each
        for run, each in zip(runs, figures)
    ]
    content = json.dumps({"faults": [*faults], "runs": told}, indent=2)
    path.with_name(f"{path.name}.json").write_text(content + "\n")
    lines = [*_head(runs), *_table(runs, figures), "", "## Faults", "", *_shown_faults(faults)]
    text = "\n".join(lines) + "\n"
    path.with_name(f"{path.name}.md").write_text(text)
    return text


def _head(runs: Sequence[Run]) -> Iterator[str]:
    yield "# An exam of pictures"
    yield ""
    for run in runs:
        yield f"- {run.title}: `launch.py serve {' '.join(run.flags)}`"
        if (loss := run.loss) is not None:
            yield (
                f"- {run.title}: rank {loss.dp_rank} (process {loss.pid}) got SIGKILL with "
                f"{loss.num_running} requests; {loss.seconds:.1f} s later all served again"
            )
    yield ""


def _table(runs: Sequence[Run], figures: Sequence[Figures]) -> Iterator[str]:
    yield _row("", [run.title for run in runs])
    yield "|---|" + "---:|" * len(runs)
    flat = [dict(_flat(each)) for each in figures]
    for name in dict.fromkeys(name for each in flat for name in each):
        yield _row(name, [_shown(each.get(name)) for each in flat])


def _flat(figures: Figures) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from ((f"{name}: {part}", number) for part, number in value.items())
        else:
            yield name, value


def _row(name: str, values: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(values)} |"


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"


def _shown_faults(faults: Sequence[str]) -> list[str]:
    more = len(faults) - SHOWN_FAULTS
    lines = [f"- {fault}" for fault in faults[:SHOWN_FAULTS]] or ["None."]
    return [*lines, f"- and {more} more"] if more > 0 else lines


def _loss(run: Run) -> Figures | None:
    if (loss := run.loss) is None:
        return None
    return {"dp_rank": loss.dp_rank, "running": loss.num_running, "seconds": loss.seconds}

"""Reads the steps of a file of `--trace` again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dp_runtime.errors import not_allowed, one_line
from dp_runtime.metrics.chrome_trace import Event
from dp_runtime.metrics.trace import PassTrace, PrefixCounts, StepTrace

PASS = re.compile(r"(.+) \((.+)\)")  # its kind and mode


def read_chrome_trace(path: Path) -> list[StepTrace]:
    """Read a trace that this runtime has written; times are rounded to nanoseconds.

    Raises ValueError for another file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise not_allowed("trace", str(path), f"a file of --trace ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(one_line(f"{path}: not a trace in JSON: {error}")) from None
    try:
        return [_step(events) for events in _by_step(document["traceEvents"])]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(one_line(f"{path}: not a trace of --trace: {why}")) from None


def _by_step(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Split the events of steps, each of which begins with its schedule."""
    found: list[Event] = []
    for event in events:
        if event["ph"] != "X":
            continue
        if event["name"] == "schedule" and found:
            yield found
            found = []
        found.append(event)
    if found:
        yield found


def _step(events: Sequence[Event]) -> StepTrace:
    named = {event["name"]: event for event in events}
    schedule, sample, commit = named["schedule"], named["sample"], named["commit"]
    encode = named.get("encode")
    done, passes = commit["args"], tuple(_passes(events))
    agree_wait_s = _seconds(named.get("wait for records"))
    accepted = tuple(done.get("verifications by accepted drafts", ()))
    return StepTrace(
        dp_rank=schedule["pid"] - 1,
        step_id=schedule["args"]["step"],
        epoch=schedule["args"]["epoch"],
        position=schedule["args"]["position"],
        start_s=schedule["ts"] / 1e6,
        schedule_s=_seconds(schedule),
        agree_s=_seconds(named["agree"]) - agree_wait_s,
        agree_wait_s=agree_wait_s,
        prepare_s=sum(one.prepare_s for one in passes),
        sample_s=_seconds(sample),
        commit_s=_seconds(commit),
        passes=passes,
        output_tokens=done["output tokens"],
        prompt_tokens=done["prompt tokens"],
        num_preemptions=done["preemptions"],
        num_drafts=max(len(accepted) - 1, 0),
        accepted=accepted,
        sample_start_s=sample["ts"] / 1e6,
        prefixes=PrefixCounts(**done["prefixes"]),
        commit_start_s=commit["ts"] / 1e6,
        encode_s=_seconds(encode),
        num_images=0 if encode is None else encode["args"]["images"],
        free_pages=done.get("free pages"),
    )


def _passes(events: Sequence[Event]) -> Iterator[PassTrace]:
    prepare_s = 0.0
    for at, event in enumerate(events):
        args, found = event["args"], PASS.fullmatch(event["name"])
        if event["name"].startswith("prepare "):
            prepare_s = _seconds(event)
        elif found is not None and "real rows" in args:
            kind, mode = found.groups()
            follows = events[at + 1]
            waited = follows if follows["name"] == "wait in collectives" else None
            yield PassTrace(
                kind, tuple(args["real rows"]), tuple(args["gathered rows"]), args["wire rows"],
                forward_s=_seconds(event), wait_s=_seconds(waited), mode=mode,
                start_s=event["ts"] / 1e6, prepare_s=prepare_s,
            )  # fmt: skip
            prepare_s = 0.0


def _seconds(event: dict[str, Any] | None) -> float:
    return 0.0 if event is None else float(event["dur"]) / 1e6

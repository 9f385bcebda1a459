"""What must hold of every Chrome trace, after the "Trace Event Format" that Perfetto reads."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

METADATA = {"process_name", "process_sort_index", "thread_name"}
TRACKS = {1: "step phases", 2: "waits for other ranks"}


def check_trace(text: str) -> list[dict[str, Any]]:
    """Return a trace's events, once their fields, names and order are seen to be right."""
    document = json.loads(text)
    assert set(document) == {"displayTimeUnit", "traceEvents"}
    events: list[dict[str, Any]] = document["traceEvents"]
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    named: dict[int, set[str]] = defaultdict(set)
    threads = set()
    for event in events:
        assert isinstance(event["name"], str)
        assert type(event["pid"]) is int
        assert event["pid"] > 0, "Perfetto takes process 0 for the kernel's"
        match event["ph"]:
            case "M":
                assert event["name"] in METADATA
                named[event["pid"]].add(event["name"])
                if event["name"] == "thread_name":
                    threads.add((event["pid"], event["tid"]))
                    assert event["args"]["name"] == TRACKS[event["tid"]]
            case "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
                assert type(event["args"]["step"]) is int
                tracks[event["pid"], event["tid"]].append(event)
            case "C":
                assert event["ts"] >= 0
                assert all(count >= 0 for count in event["args"].values())
            case kind:
                raise AssertionError(f"no event of kind {kind!r} is written")
    assert set(tracks) <= threads, "every track has a name"
    assert all(names == METADATA for names in named.values()), "every process has a name"
    for track, slices in tracks.items():
        slices.sort(key=lambda event: event["ts"])
        for one, other in pairwise(slices):
            end_ns = round(1e3 * one["ts"]) + round(1e3 * one["dur"])
            assert end_ns <= round(1e3 * other["ts"]), f"track {track}: {one} overlaps {other}"
    starts = [event["ts"] for event in events if "ts" in event]
    assert not starts or min(starts) < 1, "times begin at 0"
    return events

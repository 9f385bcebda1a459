"""Published traces: Mooncake's JSON lines and BurstGPT's CSV, read as they are."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dp_runtime.core.plain_values import plain_float, plain_int
from dp_runtime.core.settings import setting
from dp_runtime.errors import require
from dp_runtime.experiments.tables import Checked
from dp_runtime.experiments.workload.arrivals import scaled_times
from dp_runtime.experiments.workload.conversations import Segment, Turn
from dp_runtime.experiments.workload.number_file import read_lines

BLOCK_TOKENS = 512  # that a hash id of Mooncake stands for
MOONCAKE_KEY, BURST_KEY = 1, 2  # first parts of segments' keys


@dataclass(frozen=True)
class TracedRequest:
    at_s: float
    turn: Turn


@dataclass(frozen=True)
class TraceFile(Checked):
    """A file of requests with times; the first that is taken is the start."""

    path: str = setting(MISSING, "file of the trace", allowed="the path of a file")
    num_requests: int | None = setting(
        None, "requests to take", at_least=1, shown_default="all that the file has"
    )
    first_request: int = setting(0, "requests of the file to leave out before them", at_least=0)
    rate_scale: float = setting(1.0, "factor on the rate of arrivals", above=0)
    length_scale: float = setting(
        1.0, "factor on all lengths, for models with less context", above=0, at_most=1
    )

    def scaled(self, tokens: int) -> int:
        return max(1, math.ceil(tokens * self.length_scale))

    def timed(self, requests: list[TracedRequest]) -> list[TracedRequest]:
        """Take the requests that are wanted, in order of arrival."""
        requests = sorted(requests, key=lambda each: each.at_s)[self.first_request :]
        wanted = len(requests) if self.num_requests is None else self.num_requests
        ok = 0 < wanted <= len(requests)
        require(ok, "num_requests", wanted, f"1..{len(requests)}, which {self.path} has")
        taken = requests[:wanted]
        times = scaled_times(np.array([each.at_s for each in taken]), self.rate_scale)
        return [TracedRequest(float(at_s), each.turn) for at_s, each in zip(times, taken)]


@dataclass(frozen=True)
class Mooncake(TraceFile):
    """Lines of https://github.com/kvcache-ai/Mooncake, whose equal hash ids are equal tokens."""

    def requests(self, seed: int) -> list[TracedRequest]:
        lines = enumerate(read_lines(Path(self.path)), 1)
        return self.timed([self._request(text, number, seed) for number, text in lines if text])

    def _request(self, text: str, number: int, seed: int) -> TracedRequest:
        where = f"{self.path}:{number}"
        try:
            line: Any = json.loads(text)
        except ValueError:
            line = None
        require(isinstance(line, dict), where, text, "a JSON object")
        at_ms = plain_float(line.get("timestamp"))
        require(at_ms is not None, f"{where}: timestamp", line.get("timestamp"), "milliseconds")
        assert at_ms is not None, "checked above"
        input_len, output_len = (_count(line, name, where) for name in MOONCAKE_LENGTHS)
        ids, blocks = line.get("hash_ids"), math.ceil(input_len / BLOCK_TOKENS)
        ok = isinstance(ids, list) and len(ids) == blocks and all(map(_is_id, ids))
        require(ok, f"{where}: hash_ids", ids, f"{blocks} integers >= 0, one for 512 tokens")
        segments = self._segments(self.scaled(input_len), ids, seed)
        return TracedRequest(at_ms / 1e3, Turn(segments, self.scaled(output_len)))

    def _segments(self, num_tokens: int, ids: list[int], seed: int) -> tuple[Segment, ...]:
        block, segments = self.scaled(BLOCK_TOKENS), []
        for hash_id in ids:
            if num_tokens > 0:
                key = MOONCAKE_KEY, seed, hash_id
                segments.append(Segment(key, min(block, num_tokens), block))
            num_tokens -= block
        return tuple(segments)


@dataclass(frozen=True)
class BurstGpt(TraceFile):
    """Rows of https://github.com/HPMLL/BurstGPT; those without an answer failed."""

    def requests(self, seed: int) -> list[TracedRequest]:
        rows = csv.DictReader(read_lines(Path(self.path)))
        names = rows.fieldnames or ()
        for name in BURST_COLUMNS:
            require(name in names, "path", self.path, f"a CSV file with a column {name!r}")
        found = (self._request(row, number, seed) for number, row in enumerate(rows, 2))
        return self.timed([request for request in found if request is not None])

    def _request(self, row: dict[str, str], number: int, seed: int) -> TracedRequest | None:
        try:
            at_s, input_len, output_len = (float(row[name]) for name in BURST_COLUMNS)
        except (TypeError, ValueError):
            at_s = input_len = output_len = math.nan
        ok = min(input_len, output_len) >= 0 and math.isfinite(at_s + input_len + output_len)
        require(ok, f"{self.path}:{number}", dict(row), "a time and two numbers of tokens")
        if min(input_len, output_len) < 1:
            return None
        segment = Segment((BURST_KEY, seed, number), self.scaled(int(input_len)))
        return TracedRequest(at_s, Turn((segment,), self.scaled(int(output_len))))


MOONCAKE_LENGTHS = ("input_length", "output_length")
BURST_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def _count(line: dict[str, Any], name: str, where: str) -> int:
    value = plain_int(line.get(name))
    require(value is not None and value >= 1, f"{where}: {name}", line.get(name), "an integer >= 1")
    assert value is not None, "checked above"
    return value


def _is_id(value: object) -> bool:
    number = plain_int(value)
    return number is not None and number >= 0

"""Recording: the steps of a run as one file, from which the run can be replayed."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dp_runtime.errors import not_allowed, require
from dp_runtime.metrics.recorded.request_tokens import RequestTokens
from dp_runtime.metrics.recorded.typed_fields import check_fields
from dp_runtime.metrics.status import ModelInfo
from dp_runtime.metrics.trace import Arrival, End, PassTrace, PrefixCounts, StepTrace

FORMAT, VERSION = "dp-runtime recording", 2


@dataclass(frozen=True)
class ModelSizes:
    """What a replay needs of a model."""

    max_model_len: int  # tokens
    hidden_size: int
    vocab_size: int
    cache_tokens: int  # of one rank's pages

    @classmethod
    def of(cls, model: ModelInfo) -> ModelSizes:
        return cls(model.max_model_len, model.hidden_size, model.vocab_size, model.cache_tokens)


@dataclass(frozen=True)
class Recording:
    """docs/experiments.md describes the file: a header, then lines of requests and of steps."""

    config: Mapping[str, Any]  # fields of EngineConfig
    model: ModelSizes
    steps: tuple[StepTrace, ...]
    tokens: tuple[RequestTokens, ...] = ()  # of those requests whose prompts are kept
    warm_up: tuple[StepTrace, ...] = ()  # steps before them, which are no part of what is measured

    @classmethod
    def of(
        cls, config: Mapping[str, Any], model: ModelInfo, steps: tuple[StepTrace, ...],
        tokens: Iterable[RequestTokens] = (),
    ) -> Recording:  # fmt: skip
        return cls(config, ModelSizes.of(model), steps, tuple(tokens))

    @property
    def header(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "version": VERSION,
            "config": dict(self.config), "model": asdict(self.model), "tokens": len(self.tokens),
            "warm_up": len(self.warm_up),
        }  # fmt: skip

    @property
    def with_warm_up(self) -> Recording:
        return replace(self, steps=(*self.warm_up, *self.steps), warm_up=())

    def to_bytes(self) -> bytes:
        """Return the file's content, lines of JSON in gzip."""
        steps = (*self.warm_up, *self.steps)
        header = json.dumps(self.header, default=str)
        lines = [header, *map(line_of, self.tokens), *map(line_of, steps)]
        return gzip.compress("".join(f"{line}\n" for line in lines).encode(), 5)

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Read a file; ValueError if it is no recording of this version."""
        with readable(path), gzip.open(path, "rt", encoding="utf-8") as file:
            return cls.from_lines(json.loads(file.readline()), file)

    @classmethod
    def from_lines(cls, header: Any, lines: Iterable[str]) -> Recording:
        known = header.get("format") if isinstance(header, dict) else None
        require(known == FORMAT, "recording: format", known, FORMAT)
        version = header.get("version")
        require(version == VERSION, "recording: version", version, str(VERSION))
        rest = iter(lines)
        with _of_a_recording("header"):
            counts = header["tokens"], header["warm_up"]
            sizes, config = ModelSizes(**header["model"]), dict(header["config"])
        for name, count in zip(("tokens", "warm_up"), counts):
            ok = type(count) is int and 0 <= count <= sys.maxsize
            require(ok, f"recording: {name}", count, "a count of lines")
        check_fields(sizes, "recording: model", least=1)
        tokens = tuple(map(_tokens_of, islice(rest, counts[0]), itertools.count(1)))
        warm_up, steps = tuple(steps_of(islice(rest, counts[1]))), tuple(steps_of(rest))
        require(bool(steps), "recording: steps", 0, "at least one")
        ok = all(step.record for step in (*warm_up, *steps))
        require(ok, "recording: record", "none", "the record that a rank posted, in every step")
        return cls(config, sizes, steps, tokens, warm_up)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Let what is wrong with the files of a recording be a ValueError that names it."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise not_allowed("recording", str(path), f"a recording ({why})") from None
    except (EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError):
        raise not_allowed("recording", str(path), "a whole recording") from None


@contextmanager
def _of_a_recording(part: str) -> Iterator[None]:
    """Raise ValueError for a part that has other fields."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise  # of a file that is not whole, as its reader says
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise not_allowed(f"recording: {part}", why, "that of docs/experiments.md") from None


def line_of(kept: StepTrace | RequestTokens) -> str:
    return json.dumps(asdict(kept))


def _tokens_of(line: str, number: int) -> RequestTokens:
    with _of_a_recording(f"request {number}"):
        kept = RequestTokens.read(json.loads(line))
    check_fields(kept, f"recording: request {number}")
    return kept


def steps_of(lines: Iterable[str]) -> Iterator[StepTrace]:
    """Read steps; ValueError names the line, its field and what is allowed there."""
    for number, line in enumerate(lines, 1):
        with _of_a_recording(f"step {number}"):
            step = _step_of(json.loads(line))
        check_fields(step, f"recording: step {number}")
        yield step


def _step_of(values: dict[str, Any]) -> StepTrace:
    read = {name: _tuple(value) for name, value in values.items()}
    read["passes"] = tuple(
        PassTrace(**{name: _tuple(value) for name, value in each.items()})
        for each in values["passes"]
    )
    read["prefixes"] = PrefixCounts(**values["prefixes"])
    read["arrived"] = tuple(Arrival(*each) for each in values.get("arrived", ()))
    read["ended"] = tuple(End(*each) for each in values.get("ended", ()))
    return StepTrace(**read)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

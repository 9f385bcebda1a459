"""A flight record as a file of JSON lines: what it is about, then one line for each rank."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from dp_runtime.errors import require, shown
from dp_runtime.flight.record import FlightDump, RankFlight

FORMAT, VERSION = "dp-runtime flight record", 1
MAX_RANKS = 4096
MAX_LINE = 1 << 28  # characters
MAX_INT = 2**63 - 1


def to_lines(dump: FlightDump) -> Iterator[str]:
    head = {"format": FORMAT, "version": VERSION, "reason": dump.reason}
    yield json.dumps(head | {"taken_us": dump.taken_us, "num_ranks": len(dump.ranks)}) + "\n"
    for rank in dump.ranks:
        yield json.dumps(rank, default=vars, separators=(",", ":")) + "\n"


def write_dump(dump: FlightDump, path: Path) -> None:
    """Write a new file that only this user can read; OSError, also if it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        for line in to_lines(dump):
            file.write(line)


def read_dump(path: Path) -> FlightDump:
    """Read a dump; ValueError in one line if it is not one, or not all of one."""
    try:
        with open(path, encoding="utf-8") as file:
            return _parse(str(path), file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is not UTF-8 text, so no flight record") from error


def _parse(name: str, file: Any) -> FlightDump:
    head = _line(name, 1, file)
    known = isinstance(head, dict) and head.get("format") == FORMAT
    require(known, name, head, f"a flight record; its first line has format {FORMAT!r}")
    version = head.get("version")
    require(version == VERSION, f"{name}, version", version, f"{VERSION}: use the same release")
    num_ranks = _value(int, head.get("num_ranks"), f"{name}, num_ranks")
    require(1 <= num_ranks <= MAX_RANKS, f"{name}, num_ranks", num_ranks, f"1..{MAX_RANKS}")
    ranks = tuple(
        _value(RankFlight, _line(name, number, file), f"{name}, line {number}")
        for number in range(2, num_ranks + 2)
    )
    order = [rank.dp_rank for rank in ranks]
    in_order = all(one < other for one, other in pairwise(order))
    require(in_order, f"{name}, dp_rank", order, "different ranks in their order")
    reason = _value(str, head.get("reason"), f"{name}, reason")
    return FlightDump(reason, _value(int, head.get("taken_us"), f"{name}, taken_us"), ranks)


def _line(name: str, number: int, file: Any) -> Any:
    text = file.readline(MAX_LINE)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "the file is cut off" if not text.endswith("\n") else "the line is not JSON"
        raise ValueError(f"{name}, line {number}: {what}") from error


@cache
def _types_of(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind)} if is_dataclass(kind) else hints


def _value(kind: Any, value: Any, where: str) -> Any:
    """Read one of JSON's values as one of the record's types; ValueError says where it is not."""
    match kind:
        case _ if kind is int:
            ok = type(value) is int and -MAX_INT <= value <= MAX_INT
        case _ if kind is float:
            ok, value = type(value) in (int, float), value
        case _ if kind is str:
            ok = type(value) is str
        case _ if get_origin(kind) is tuple:
            return _tuple(kind, value, where)
        case _ if issubclass(kind, StrEnum):
            ok = value in list(kind)
            value = kind(value) if ok else value
        case _ if issubclass(kind, tuple):
            return _named_tuple(kind, value, where)
        case _:
            return _dataclass(kind, value, where)
    if not ok:
        raise ValueError(f"{where}: {shown(value)} is not allowed; {kind.__name__}")
    return value


def _tuple(kind: Any, value: Any, where: str) -> tuple[Any, ...]:
    require(isinstance(value, list), where, value, "a list")
    of = get_args(kind)[0]
    return tuple(_value(of, item, where) for item in value)


def _named_tuple(kind: Any, value: Any, where: str) -> Any:
    types = _types_of(kind)
    require(isinstance(value, list) and len(value) == len(types), where, value, f"{list(types)}")
    return kind(*(_value(of, item, where) for of, item in zip(types.values(), value)))


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    types = _types_of(kind)
    ok = isinstance(value, dict) and value.keys() == types.keys()
    require(ok, where, value, f"an object with {', '.join(types)}")
    return kind(**{name: _value(of, value[name], f"{where}, {name}") for name, of in types.items()})

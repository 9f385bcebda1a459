"""Files of numbers: one in each line, or a column of a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dp_runtime.errors import not_allowed, require


def read_numbers(path: Path, column: str | None) -> NDArray[np.float64]:
    """Read finite numbers; ValueError names the line of what is none."""
    texts = list(enumerate(read_lines(path), 1)) if column is None else _column(path, column)
    numbers = [_number(text, path, line) for line, text in texts if text.strip()]
    require(bool(numbers), "path", str(path), "a file with at least one number")
    return np.array(numbers)


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise not_allowed("path", str(path), f"a file that exists ({error.strerror})") from None
    except UnicodeDecodeError:
        raise not_allowed("path", str(path), "a text file in UTF-8") from None


def _column(path: Path, column: str) -> list[tuple[int, str]]:
    rows = csv.DictReader(read_lines(path))
    names = list(rows.fieldnames or ())
    require(column in names, "column", column, f"one of {', '.join(names)} of {path}")
    return [(number, row[column] or "") for number, row in enumerate(rows, 2)]


def _number(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    require(np.isfinite(value), f"{path}:{line}", text, "a number")
    return value

"""Output of commands: files that are opened before the work, and the console."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from tqdm import tqdm

from dp_runtime.errors import require


class WriteFailed(RuntimeError):
    """The target takes no more: a full disk, a closed pipe."""


class OutputFile:
    """A text file that is opened at once (ValueError) and flushed after writes (WriteFailed)."""

    def __init__(self, flag: str, path: Path) -> None:
        self._name = f"{flag}: {str(path)!r}"
        self._begun = False  # until then a file keeps what it had, should the ranks not start
        try:
            self._file: IO[str] = open(path, "w", encoding="utf-8", opener=_open)  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"{self._name} is not allowed; {error.strerror}") from error

    def write(self, text: str) -> None:
        try:
            if not self._begun:
                self._begun = True
                with suppress(OSError):  # it is no regular file
                    os.ftruncate(self._file.fileno(), 0)
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise WriteFailed(f"{self._name}: {error.strerror}") from error

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError as failed:
            if error is None:
                raise WriteFailed(f"{self._name}: {failed.strerror}") from failed


def same_file(one: Path, other: Path) -> bool:
    """Tell if both name one regular file; a terminal may well be read and written."""
    try:
        return one.is_file() and one.samefile(other)
    except OSError:
        return False


def check_not_read(output: Path, read: Iterable[Path], allowed: str) -> None:
    """Raise ValueError if --output names a file that is read."""
    require(not any(same_file(output, path) for path in read), "output", str(output), allowed)


def print_line(text: str) -> None:
    """Print to stdout, above a progress bar if there is one; WriteFailed if nobody reads it."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError as error:
        _drop_stdout()
        raise WriteFailed(f"stdout: {error.strerror}") from error


def open_closed_streams() -> None:
    """Reopen streams that the caller closed, or the next files would get their descriptors.

    Writing to stdout stays an error, stderr goes nowhere.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115


def escape_unprintable() -> None:
    """Let the console show what its encoding lacks as escapes, where it would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Send what stdout still holds nowhere, or Python complains of it once more at exit."""
    try:
        target = sys.stdout.fileno()
    except OSError:
        return  # it is no file
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, target)
    os.close(nowhere)


def _open(path: str, flags: int) -> int:
    """Open without truncating, and without waiting: a pipe that nobody reads is an error."""
    descriptor = os.open(path, flags & ~os.O_TRUNC | os.O_NONBLOCK, 0o666)
    os.set_blocking(descriptor, True)
    return descriptor

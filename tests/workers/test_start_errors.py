"""Limits of the machine that a start meets: one line with the remedy."""

from __future__ import annotations

import errno
import os

import pytest

import workers
from dp_runtime import Engine, EngineConfig
from dp_runtime.errors import StartError
from workers.start_errors import explained


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), r"ulimit -n"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/tmp/x"), r"'/tmp/x'; set TMPDIR"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/tmp/x"), r"set TMPDIR"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
         r"set TMPDIR"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), r"free some space"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), r"ulimit -u"),
        (RuntimeError("can't start new thread"), r"ulimit -u"),
    ],
)  # fmt: skip
def test_limits_of_the_machine(
    error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> object:
        raise error

    monkeypatch.setattr(workers, "_launch", fail)
    with pytest.raises(StartError, match=remedy) as caught:
        Engine(EngineConfig("x", launcher="local"))
    assert "\n" not in str(caught.value)


def test_other_errors_keep_their_text() -> None:
    assert explained(OSError("full")) == "full"
    assert explained(ValueError("x: 1 is not allowed")) == "x: 1 is not allowed"
    assert explained(KeyError()) == "KeyError"


@pytest.mark.parametrize("config", ["some/path", None, {"model": "x"}, EngineConfig])
def test_what_is_no_config(config: object) -> None:
    with pytest.raises(ValueError, match=r"^config: .* is not allowed; an EngineConfig"):
        Engine(config)  # type: ignore[arg-type]

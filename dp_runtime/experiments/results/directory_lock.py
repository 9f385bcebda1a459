"""A lock on a directory of results: one process writes there, until it ends, however it ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dp_runtime.errors import not_allowed

LOCK = ".lock"  # a file that stays: one that is removed could be locked by two, each its own


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep others out of a directory; ValueError at once if another is in."""
    try:
        # A file, since NFS locks no directory, and to write, since NFS locks no other.
        file = (directory / LOCK).open("a")
    except OSError as error:
        allowed = f"a directory to write into ({error.strerror})"
        raise not_allowed("out", str(directory), allowed) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            allowed = "a directory that no experiment is writing into now; wait for it, or end it"
            raise not_allowed("out", str(directory), allowed) from None
        except OSError as error:
            allowed = f"a directory on a file system with locks ({error.strerror})"
            raise not_allowed("out", str(directory), allowed) from None
        yield

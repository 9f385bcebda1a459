"""Text files of a checkpoint: regular, bounded, UTF-8 whatever the locale is; else ValueError."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from dp_runtime.errors import require

MAX_BYTES = 256 << 20


def is_present(path: Path) -> bool:
    """Tell if there is a file; ValueError for a FIFO or a device, which could be read forever."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from None
    except ValueError as error:  # a null character or a surrogate
        raise ValueError(f"{shown(path)}: no file can have this name: {shown(error)}") from None
    require(stat.S_ISREG(mode), shown(path), stat.filemode(mode), "a regular file")
    return True


def read_text(path: Path) -> str:
    require(is_present(path), shown(path), "missing", "an existing file")
    size = path.stat().st_size
    require(size <= MAX_BYTES, shown(path), f"{size:,} bytes", f"at most {MAX_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path)}: not valid UTF-8: {error.reason}") from None


def read_json(path: Path, expected: str = "valid JSON") -> Any:
    reason = "nested too deeply"
    try:
        return json.loads(read_text(path))
    except RecursionError:
        pass
    except ValueError as error:
        reason = str(error).removeprefix(f"{shown(path)}: ")
    raise ValueError(f"{shown(path)}: not {expected}: {reason}")


def shown(value: object, length: int = 200) -> str:
    """Escape text of a file for a message, and cut it."""
    text = str(value).encode("unicode_escape").decode("ascii")
    return text if len(text) <= length else f"{text[: length - 3]}..."

"""Command-line flags for the described fields of a dataclass."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dp_runtime.core.settings import settings_of


def add_flags(
    parser: argparse.ArgumentParser,
    owner: type,
    only: Collection[str] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Add a flag for each described field; `defaults` are shown instead of the fields' own."""
    defaults = defaults or {}
    for item in settings_of(owner):
        if only is not None and item.name not in only:
            continue
        how: dict[str, Any] = {"type": item.kind, "choices": item.setting.choices or None}
        if item.kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if item.repeated:
            how = {"action": "append", "type": utf8_text if item.kind is str else item.kind}
        shown = defaults.get(item.name, item.shown_default)
        text = f"{item.setting.doc} (default: {shown}{'; may be repeated' * item.repeated})"
        parser.add_argument(item.flag, help=text, default=argparse.SUPPRESS, **how)


def given_fields(options: argparse.Namespace, owner: type) -> dict[str, Any]:
    names = [item.name for item in settings_of(owner)]
    return {name: getattr(options, name) for name in names if name in options}


def new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in an existing directory")
    return path


def utf8_text(text: str) -> str:
    """Read an argument as UTF-8, whatever the locale; as the locale's only if it is not UTF-8."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text

"""What a checkpoint's files say about chats; ValueError where they are not what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dp_runtime.errors import not_allowed, require
from dp_runtime.metrics.status import DEFAULT_TEMPLATE, TOOL_TEMPLATE, ChatFiles
from dp_runtime.weights.files import is_present, read_json, read_text


def read_chat_files(directory: str) -> ChatFiles:
    """Read tokenizer_config.json; a template in a file of its own counts instead of its."""
    path = Path(directory, "tokenizer_config.json")
    config = read_json(path) if is_present(path) else {}
    require(isinstance(config, dict), path.name, config, "a JSON object")
    named = _in_files(Path(directory)) or _in_config(config.get("chat_template"))
    tokens = {
        name: _token_text(name, value)
        for name, value in config.items()
        if name.endswith("_token") and value is not None and not isinstance(value, bool)
    }
    return ChatFiles(named, tokens)


def _in_files(directory: Path) -> dict[str, str]:
    paths = {
        DEFAULT_TEMPLATE: directory / "chat_template.jinja",
        TOOL_TEMPLATE: directory / "additional_chat_templates" / f"{TOOL_TEMPLATE}.jinja",
    }
    return {name: read_text(path) for name, path in paths.items() if is_present(path)}


def _in_config(given: Any) -> dict[str, str]:
    match given:
        case None:
            return {}
        case str():
            return {DEFAULT_TEMPLATE: given}
        case [*entries]:
            return dict(map(_named_template, entries))
    raise _bad_template(given)


def _named_template(entry: Any) -> tuple[str, str]:
    match entry:
        case {"name": str(name), "template": str(template)}:
            return name, template
    raise _bad_template(entry)


def _bad_template(given: object) -> ValueError:
    allowed = "a text, or a list of objects with a name and a template"
    return not_allowed("chat_template of tokenizer_config.json", given, allowed)


def _token_text(name: str, token: Any) -> str:
    match token:
        case str(text) | {"content": str(text)}:
            return text
    raise not_allowed(
        f"{name} of tokenizer_config.json", token, "a text, or an object with content"
    )

"""Messages of a chat, read from JSON; a ValueError names the message and the part at fault."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dp_runtime.errors import not_allowed, require

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_ENTRIES = 4096  # of any list: templates may loop over messages within a loop over messages
_READ = {"role", "content", "name", "tool_call_id", "tool_calls", "reasoning", "reasoning_content"}
_UNUSED = {"refusal", "annotations", "audio", "function_call"}  # clients send answers back
_DETAILS = ("auto", "low", "high")
_CALLS_FUNCTION = {"type": "function"}


@dataclass(frozen=True)
class ImageUrl:
    field: str  # the part that has it
    url: str


@dataclass(frozen=True)
class Message:
    role: str
    parts: tuple[str | ImageUrl, ...]  # texts and images
    more: Mapping[str, Any]  # what else templates read: name, tool_call_id, tool_calls, reasoning

    @property
    def text(self) -> str:
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[ImageUrl, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImageUrl))

    def for_template(self, in_parts: bool) -> dict[str, Any]:
        """The message as templates read it: one text, or a list of parts where it has images."""
        in_parts = in_parts or len(self.images) > 0
        content = list(map(_shown, self.parts)) if in_parts else self.text
        return {"role": self.role, "content": content, **self.more}


def read_messages(given: object, ignore_unknown: bool = False) -> tuple[Message, ...]:
    entries = read_list("messages", given)
    require(len(entries) > 0, "messages", given, "at least one message")
    return tuple(
        _message(f"messages[{index}]", entry, ignore_unknown) for index, entry in enumerate(entries)
    )


def read_list(field: str, given: object) -> list[Any]:
    if not isinstance(given, list):
        raise not_allowed(field, given, "a list")
    require(len(given) <= MAX_ENTRIES, field, f"{len(given)} entries", f"at most {MAX_ENTRIES}")
    return given


def read_object(field: str, given: object) -> dict[str, Any]:
    """A JSON object, without its nulls: they are as absent."""
    if not isinstance(given, dict):
        raise not_allowed(field, given, "an object")
    return {key: value for key, value in given.items() if value is not None}


def read_text(field: str, given: object) -> str:
    if not isinstance(given, str):
        raise not_allowed(field, given, "a text")
    return given


def _message(field: str, given: object, ignore_unknown: bool) -> Message:
    message = read_object(field, given)
    role = message.get("role")
    require(role in ROLES, f"{field}.role", role, f"one of {', '.join(ROLES)}")
    unknown = next((key for key in message if key not in _READ | _UNUSED), None)
    known = f"known fields: {', '.join(sorted(_READ))}"
    ok = ignore_unknown or unknown is None
    require(ok, f"{field}.{unknown}", message.get(str(unknown)), known)
    content = message.get("content")
    if content is None:
        require(role == "assistant", f"{field}.content", None, "a text or a list of parts")
    parts = () if content is None else _parts(f"{field}.content", content)
    return Message(str(role), parts, _more(field, message))


def _parts(field: str, given: object) -> tuple[str | ImageUrl, ...]:
    if isinstance(given, str):
        return (given,)
    parts = read_list(field, given)
    return tuple(_part(f"{field}[{index}]", part) for index, part in enumerate(parts))


def _part(field: str, given: object) -> str | ImageUrl:
    match read_object(field, given):
        case {"type": "text", "text": str(text)} | {"type": "refusal", "refusal": str(text)}:
            return text
        case {"type": "text"}:
            raise not_allowed(f"{field}.text", None, "a text")
        case {"type": "image_url", **more}:
            return _image_url(field, more.get("image_url"))
        case {"type": str(kind)}:
            known = "parts are text, and image_url where the model reads images"
            raise ValueError(f"{field}: {kind[:40]!r} is not supported: {known}")
    raise not_allowed(field, given, 'an object with a type, as {"type": "text", "text": "..."}')


def _image_url(field: str, given: object) -> ImageUrl:
    """OpenAI's object, or its url alone."""
    image = {"url": given} if isinstance(given, str) else read_object(f"{field}.image_url", given)
    detail = image.get("detail", "auto")
    require(detail in _DETAILS, f"{field}.image_url.detail", detail, f"one of {_DETAILS}")
    return ImageUrl(field, read_text(f"{field}.image_url.url", image.get("url")))


def _shown(part: str | ImageUrl) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def _more(field: str, message: Mapping[str, Any]) -> dict[str, Any]:
    names = ("name", "tool_call_id")
    more: dict[str, Any] = {
        name: read_text(f"{field}.{name}", message[name]) for name in names if name in message
    }
    if calls := read_list(f"{field}.tool_calls", message.get("tool_calls", [])):
        more["tool_calls"] = [
            _tool_call(f"{field}.tool_calls[{index}]", call) for index, call in enumerate(calls)
        ]
    for name in ("reasoning", "reasoning_content"):
        if name in message:
            text = read_text(f"{field}.{name}", message[name])
            more["reasoning_content"] = more["thinking"] = text  # templates read either
    return more


def _tool_call(field: str, given: object) -> dict[str, Any]:
    call = read_object(field, given)
    function = read_object(f"{field}.function", call.get("function"))
    name = read_text(f"{field}.function.name", function.get("name"))
    arguments = _arguments(f"{field}.function.arguments", function.get("arguments", {}))
    call_id = {"id": read_text(f"{field}.id", call["id"])} if "id" in call else {}
    return call_id | _CALLS_FUNCTION | {"function": {"name": name, "arguments": arguments}}


def _arguments(field: str, given: object) -> object:
    """An object, as templates want them; a text that is none stays: models write such, too."""
    if isinstance(given, dict):
        return given
    text = read_text(field, given)
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text

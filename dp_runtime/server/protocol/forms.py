"""The form that an answer must have, as requests ask for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.errors import not_allowed
from dp_runtime.server.errors import refuse

_ABOUT_A_FORM = re.compile(r"structured_outputs[.a-z_]*: .* is not allowed; (.*)", re.DOTALL)
_FORMATS = 'a type: text, json_object, or json_schema with {"schema": {...}}'


def read_form(
    response_format: Mapping[str, Any] | None, structured_outputs: Mapping[str, Any] | None
) -> StructuredOutputs | None:
    """Read whichever of the two a request has (ValueError)."""
    if structured_outputs is None:
        return _read_format(response_format)
    if response_format is not None:
        raise refuse("response_format", response_format, "absent beside structured_outputs")
    given = {name: value for name, value in structured_outputs.items() if value is not None}
    return StructuredOutputs.read(given)


def _read_format(given: Mapping[str, Any] | None) -> StructuredOutputs | None:
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return StructuredOutputs(json_object=True)
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return StructuredOutputs(json=schema)
    raise refuse("response_format", given, _FORMATS)


def about_form(error: ValueError, field: str, value: object) -> ValueError:
    """Name the request's own field in an error about the form that was made of it."""
    found = _ABOUT_A_FORM.fullmatch(str(error))
    return error if found is None else not_allowed(field, value, found[1])

"""Grammars of answers that must be calls, in the Lark of llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dp_runtime.chat.reasoning import BEGIN, END, Thought
from dp_runtime.chat.tool_calls import CLOSE, OPEN
from dp_runtime.chat.tools import Tool, ToolUse

_NO_PARAMETERS = {"additionalProperties": False}
# White space as models are trained on, so that none is left to write on end.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def forced_calls(use: ToolUse, thought: Thought) -> str:
    """Calls as Hermes writes them, whatever the model's own manner is, and nothing beside them."""
    again = "" if use.max_calls == 1 else ' ("\\n" call)*'
    names = [f"call_{number}" for number in range(len(use.forced))]
    rules = [_call(name, tool) for name, tool in zip(names, use.forced)]
    return after_thought(
        f"answer: call{again}\ncall: {' | '.join(names)}\n{''.join(rules)}", thought
    )


def after_thought(rules: str, thought: Thought) -> str:
    """The grammar of `answer`, one of these rules, behind what the model may think before."""
    if thought is Thought.NONE:
        return f"start: answer\n{rules}"
    opening = "" if thought is Thought.OPEN else f"{_text(BEGIN)} "
    optional = "" if thought is Thought.OPEN else "?"
    return (
        f'start: ({opening}thought ("\\n" | "\\n\\n")?){optional} answer\n'
        f"thought[suffix={_text(END)}]: /(?s:.*)/\n{rules}"
    )


def _call(name: str, tool: Tool) -> str:
    begin = f'{OPEN}\n{{"name": {_text(tool.name)}, "arguments": '
    end = f"}}\n{CLOSE}"
    schema = json.dumps(_schema(tool.parameters))
    return (
        f"{name}: {_text(begin)} {name}_arguments {_text(end)}\n{name}_arguments: %json {schema}\n"
    )


def _schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments are an object, and a tool that describes none takes none."""
    own = parameters or _NO_PARAMETERS
    return {**own, "type": "object", "x-guidance": _SPACING}


def _text(text: str) -> str:
    return json.dumps(text)

"""Tools that a request offers, and which of them the model may or must call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dp_runtime.chat.messages import read_list, read_object
from dp_runtime.errors import not_allowed, require

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_CHOICES = 'none, auto, required or {"type": "function", "function": {"name": "..."}}'


@dataclass(frozen=True, eq=False)
class Tool:
    name: str
    parameters: Mapping[str, Any]  # a JSON schema
    given: Mapping[str, Any]  # as templates read it


@dataclass(frozen=True, eq=False)
class ToolUse:
    """What the model is told of, what it must call, and how often it may."""

    offered: tuple[Tool, ...] = ()
    forced: tuple[Tool, ...] = ()  # it must call one of them, and nothing else
    max_calls: int | None = None

    @classmethod
    def read(cls, tools: object, choice: object, parallel: bool = True) -> ToolUse:
        """Read `tools`, `tool_choice` and `parallel_tool_calls`; "none" is as without tools."""
        offered = read_tools(tools)
        max_calls = None if parallel else 1
        match choice:
            case None | "auto":
                return cls(offered, (), max_calls)
            case "none":
                return cls()
            case "required":
                require(len(offered) > 0, "tool_choice", choice, "none or auto without tools")
                return cls(offered, offered, max_calls)
            case {"type": "function", "function": {"name": str(name)}}:
                named = tuple(tool for tool in offered if tool.name == name)
                names = ", ".join(tool.name for tool in offered) or "none: there are no tools"
                require(len(named) == 1, "tool_choice.function.name", name, f"one of {names}")
                return cls(offered, named, 1)
        raise not_allowed("tool_choice", choice, _CHOICES)


def read_tools(given: object) -> tuple[Tool, ...]:
    entries = [] if given is None else read_list("tools", given)
    tools = tuple(_tool(f"tools[{index}]", entry) for index, entry in enumerate(entries))
    names = [tool.name for tool in tools]
    require(len(set(names)) == len(names), "tools", names, "each name once")
    return tools


def _tool(field: str, given: object) -> Tool:
    tool = read_object(field, given)
    kind = tool.get("type", "function")
    require(kind == "function", f"{field}.type", kind, "function")
    function = read_object(f"{field}.function", tool.get("function"))
    name = function.get("name")
    ok = isinstance(name, str) and _NAME.fullmatch(name) is not None
    require(ok, f"{field}.function.name", name, "1 to 128 of A-Z, a-z, 0-9, _ . : -")
    parameters = function.get("parameters", {})
    require(isinstance(parameters, dict), f"{field}.function.parameters", parameters, "an object")
    return Tool(str(name), parameters, {"type": "function", **tool, "function": function})

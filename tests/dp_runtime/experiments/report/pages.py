"""Reads a report as a browser does: its elements, and the data in it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    children: list[Element] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all(self, name: str, **attributes: str) -> list[Element]:
        """Find the elements below of a name, with some classes or other attributes."""
        here = [
            child for child in self.children
            if child.name == name
            and all(
                value in (child.attributes.get(key.rstrip("_")) or "").split(" ")
                for key, value in attributes.items()
            )
        ]  # fmt: skip
        return here + [found for child in self.children for found in child.all(name, **attributes)]

    @property
    def text(self) -> str:
        return "".join([*self.texts, *(child.text for child in self.children)])


class Page(HTMLParser):
    """Raises AssertionError where an element is not closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("page", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root], "everything is closed"
        (script,) = self.root.all("script", id="data")
        self.data: dict[str, Any] = json.loads(script.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].texts.append(data)

"""HTML whose texts are escaped as it is made."""

from __future__ import annotations

from html import escape


class Html(str):
    """A text that is markup already."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: object) -> Html:
    """Make an element; children that are not Html are escaped, `class_` is the attribute class."""
    inner = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{inner}</{name}>")


def joined(*parts: str) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))

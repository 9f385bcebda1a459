"""Figure: a chart with its title, what it tells, and the data that a pointer over it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dp_runtime.experiments.report.charts.markup import Html, tag


@dataclass(frozen=True)
class Figure:
    title: str
    text: str  # what it shows, in a sentence
    unit: str  # of its values
    body: Html
    legend: Mapping[str, str] = field(default_factory=dict)  # names by their colours' classes
    data: Mapping[str, Any] = field(default_factory=dict)  # of the chart, as JSON

    def html(self, name: str) -> Html:
        keys = [
            tag("span", tag("i", class_=colour), label) for colour, label in self.legend.items()
        ]
        caption = tag(
            "figcaption", tag("h3", self.title), tag("p", self.text), tag("p", *keys, class_="key")
        )
        return tag("figure", caption, self.body, id=name, data_unit=self.unit)

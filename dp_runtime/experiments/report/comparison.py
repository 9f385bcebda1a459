"""Points of a grid beside each other, and what is other in another run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dp_runtime.errors import not_allowed
from dp_runtime.experiments.measurement.intervals import Interval
from dp_runtime.experiments.report.charts.bars import intervals
from dp_runtime.experiments.report.charts.figure import Figure
from dp_runtime.experiments.report.source import Source, Summary
from dp_runtime.experiments.report.words import FIGURES

INSEPARABLE, SAME, ONCE = "may be chance", "the same", "one run each"


def grid_figures(summary: Summary, noise: Mapping[str, float]) -> Iterator[Figure]:
    """Draw each figure that is not the same everywhere, and of which more is better or worse."""
    for name, words in FIGURES.items():
        if not words.better:
            continue
        rows = [(label, found[name]) for label, found in summary.items() if name in found]
        if len({interval.mean for _, interval in rows}) < 2:
            continue
        spread = f"Repeats of a point differ by {noise[name]:.1%}." if name in noise else ""
        yield intervals(
            words.title, f"{words.better.capitalize()} is better. {spread}", words.unit, rows
        )


@dataclass(frozen=True)
class Change:
    """A figure of a point, in the other run and in this one."""

    point: str
    figure: str
    before: Interval
    after: Interval

    @property
    def relative(self) -> float | None:
        return self.after.mean / self.before.mean - 1 if self.before.mean else None

    @property
    def reading(self) -> str:
        """Judge by the intervals: those that overlap tell nothing."""
        ends = self.before.low, self.before.high, self.after.low, self.after.high
        if self.before.mean == self.after.mean:
            return SAME
        if any(end is None for end in ends):
            return ONCE
        low, high, other_low, other_high = (end for end in ends if end is not None)
        if other_low <= high and low <= other_high:
            return INSEPARABLE
        better = FIGURES[self.figure].better
        if not better:
            return "other"
        return "better" if (self.after.mean > self.before.mean) == (better == "higher") else "worse"


def changes(this: Source, other: Source) -> list[Change]:
    """Pair points of the same name, or the only point of each; ValueError if none fits."""
    return [
        Change(point, name, other.summary[before][name], this.summary[point][name])
        for point, before in pairs(this, other)
        for name in FIGURES
        if name in other.summary[before] and name in this.summary[point]
    ]


def pairs(this: Source, other: Source) -> list[tuple[str, str]]:
    """Pair the points of this source with those of the other."""
    if len(this.summary) == len(other.summary) == 1:
        return list(zip(this.summary, other.summary))
    found = [(point, point) for point in this.summary if point in other.summary]
    if not found:
        allowed = f"results with one of the points {', '.join(this.summary)}"
        raise not_allowed("against", ", ".join(other.summary), allowed)
    return found


def changed_settings(this: Source, other: Source) -> list[tuple[str, Any, Any]]:
    """List settings that all pairs have changed alike: name, before, after."""
    found: list[dict[str, tuple[Any, Any]]] = []
    for point, before in pairs(this, other):
        now, then = this.settings.get(point, {}), other.settings.get(before, {})
        names = dict.fromkeys((*then, *now)) if now and then else {}
        values = {name: (then.get(name), now.get(name)) for name in names}
        found.append({name: two for name, two in values.items() if two[0] != two[1]})
    first = found[0]
    return [(n, *two) for n, two in first.items() if all(each.get(n) == two for each in found)]

"""CostModel: the time of a step as a sum of what it does, fitted to recorded steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp_runtime.errors import require
from dp_runtime.experiments.replay.step_shape import StepShape
from dp_runtime.parallel.execution_plan import ExecutionMode

Float64 = NDArray[np.float64]

FEATURES: Mapping[str, Callable[[StepShape], float]] = {
    "step": lambda shape: 1.0,
    "rank": lambda shape: shape.dp_size,  # the agreement's records
    "graph pass": lambda shape: shape.count(
        ExecutionMode.GRAPH
    ),  # passes: draft models have theirs
    "piecewise pass": lambda shape: shape.count(ExecutionMode.PIECEWISE),
    "eager pass": lambda shape: shape.count(ExecutionMode.EAGER),
    "rank with rows": lambda shape: sum(rows > 0 for rows in shape.rank_rows),
    "row of the largest rank": lambda shape: max(shape.rank_rows),
    "row of all ranks": lambda shape: shape.real_rows,  # where ranks share cores
    "attended token of the largest rank": lambda shape: max(shape.attended_tokens),
    "attended token of all ranks": lambda shape: sum(shape.attended_tokens),
    "cached token of the largest rank": lambda shape: max(shape.kv_tokens),
    "cached token of all ranks": lambda shape: sum(shape.kv_tokens),
    "gathered row": lambda shape: shape.gathered_rows,  # of the experts' inputs
    "gathered row of each rank's share": lambda shape: shape.gathered_rows / shape.dp_size,
    "wire row of a rank": lambda shape: shape.wire_rows / shape.dp_size,
    "token": lambda shape: sum(shape.num_sampling),
}
STEP, WIRE = "step", "wire row of a rank"
ROUNDS = 20  # of reweighting towards absolute errors
LEAST_ERROR, LEAST_RATIO = 1e-3, 0.05  # smaller ones weigh as much
LIKE = 5  # steps of the same rows, at least, that have a median


@dataclass(frozen=True)
class CostModel:
    """Seconds by feature, none below 0."""

    seconds: Mapping[str, float]

    @classmethod
    def fit(cls, shapes: Sequence[StepShape], measured: Sequence[float]) -> CostModel:
        """Minimize the sum of |log(predicted / measured)|; ValueError without scipy or few steps.

        What is the same in all steps can not be told from the cost of a step, and has none: that
        of a rank, without runs of several sizes.
        """
        allowed = "installed: pip install 'dp-runtime[experiments]'"
        require(find_spec("scipy") is not None, "scipy", None, allowed)
        columns = {name: np.array([value(s) for s in shapes]) for name, value in FEATURES.items()}
        names = [name for name in columns if name == STEP or np.ptp(columns[name]) > 0]
        allowed = f"at least {2 * len(names)} to fit {len(names)} costs"
        require(len(shapes) >= 2 * len(names), "recording: steps", len(shapes), allowed)
        values = np.stack([columns[name] for name in names], axis=1)
        return cls(dict(zip(names, _least_errors(values, np.array(measured)).tolist())))

    def __call__(self, shape: StepShape) -> float:
        return sum(seconds * FEATURES[name](shape) for name, seconds in self.seconds.items())

    def with_wire(self, seconds_per_row: float) -> CostModel:
        """Take another time for a row that a rank gets from another, in all of a pass's layers."""
        return CostModel({**self.seconds, WIRE: seconds_per_row})

    def __str__(self) -> str:
        costs = [f"{1e6 * cost:.3g} us a {name}" for name, cost in self.seconds.items() if cost]
        return ", ".join(costs)


def _least_errors(values: Float64, measured: Float64) -> Float64:
    """Fit measured [steps] as values [steps, features] @ costs, by absolute errors of logarithms.

    Unlike relative errors, they do not draw a fit towards the fastest steps of a noisy machine.
    """
    from scipy.optimize import nnls

    relative = values / measured[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), np.finfo(np.float64).tiny)
    scaled = relative / scale
    weights = np.ones(len(measured))
    for _ in range(ROUNDS):
        costs, _ = nnls(scaled * weights[:, None], weights)
        ratio = np.maximum(scaled @ costs, LEAST_RATIO)
        errors = np.maximum(np.abs(np.log(ratio)), LEAST_ERROR)
        weights = 1 / np.sqrt(errors * ratio)  # (ratio - 1) / sqrt(ratio) is nearly log(ratio)
    result: Float64 = costs / scale
    return result


@dataclass(frozen=True)
class FitError:
    """Relative errors of predicted step times, and how much steps of the same rows differ."""

    p50: float
    p90: float
    of_p50: float  # predicted median over measured median, less 1
    num_steps: int
    factor: float  # median of measured / predicted: how fast the machine is now
    scaled_p50: float  # of a step, once that is known
    alike_p50: float | None  # of medians of steps with the same rows, weighed by their number
    noise: float | None  # of those steps around their medians: no model's error can be less

    @classmethod
    def of(
        cls, shapes: Sequence[StepShape], predicted: Sequence[float], measured: Sequence[float]
    ) -> FitError:
        guess, true = np.array(predicted), np.array(measured)
        p50, p90 = np.percentile(_errors(guess, true), (50, 90)).tolist()
        of_p50 = float(np.median(guess) / np.median(true) - 1)
        places: dict[object, list[int]] = defaultdict(list)
        for place, shape in enumerate(shapes):
            places[shape.rows].append(place)
        groups = [each for each in places.values() if len(each) >= LIKE]
        alike: list[float] = []
        noise: list[float] = []
        for group in groups:
            median = np.median(true[group])
            alike += [float(_errors(np.median(guess[group]), median))] * len(group)
            noise += _errors(true[group], median).tolist()
        medians = (float(np.median(each)) if each else None for each in (alike, noise))
        factor = float(np.median(true / guess))
        scaled = float(np.median(_errors(guess * factor, true)))
        return cls(p50, p90, of_p50, len(true), factor, scaled, *medians)

    def __str__(self) -> str:
        text = (
            f"error of a step {self.p50:.1%} (p50), {self.p90:.1%} (p90), "
            f"of the median step {self.of_p50:+.1%}, {self.num_steps} steps; "
            f"beside a factor of {self.factor:.2f} for all of them {self.scaled_p50:.1%} (p50)"
        )
        if self.alike_p50 is None:
            return text
        return (
            f"{text}; of medians of steps with the same rows {self.alike_p50:.1%}, "
            f"while such steps differ by {self.noise:.1%}"
        )


def _errors(guess: Any, true: Any) -> Float64:
    errors: Float64 = np.abs(np.asarray(guess) / true - 1)
    return errors

"""CostModel: the time of a step as a sum of what it does, fitted to recorded steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from dp_runtime.errors import require
from dp_runtime.experiments.replay.step_shape import StepShape

Float64 = NDArray[np.float64]

FEATURES: Mapping[str, Callable[[StepShape], float]] = {
    "step": lambda shape: 1.0,
    "rank": lambda shape: shape.dp_size,  # the agreement's records
    "row of the largest rank": lambda shape: max(shape.rank_rows),
    "row of all ranks": lambda shape: shape.real_rows,  # where ranks share cores
    "attended token of the largest rank": lambda shape: max(shape.attended_tokens),
    "attended token of all ranks": lambda shape: sum(shape.attended_tokens),
    "cached token of the largest rank": lambda shape: max(shape.kv_tokens),
    "gathered row": lambda shape: shape.gathered_rows,  # of the experts' inputs
    "gathered row of each rank's share": lambda shape: shape.gathered_rows / shape.dp_size,
    "wire row of a rank": lambda shape: shape.wire_rows / shape.dp_size,
    "token": lambda shape: sum(shape.num_sampling),
}
WIRE, RANK = "wire row of a rank", "rank"
ROUNDS = 20  # of reweighting towards absolute errors
LEAST_ERROR = 1e-3  # relative: smaller ones weigh as much


@dataclass(frozen=True)
class CostModel:
    """Seconds by feature, none below 0."""

    seconds: Mapping[str, float]

    @classmethod
    def fit(cls, shapes: Sequence[StepShape], measured: Sequence[float]) -> CostModel:
        """Minimize the sum of relative errors; ValueError without scipy or with few steps.

        Without runs of several sizes nothing tells a rank's cost from a step's: it is 0 then.
        """
        allowed = "installed: pip install 'dp-runtime[experiments]'"
        require(find_spec("scipy") is not None, "scipy", None, allowed)
        names = list(FEATURES)
        if len({shape.dp_size for shape in shapes}) == 1:
            names.remove(RANK)
        allowed = f"at least {2 * len(names)} to fit {len(names)} costs"
        require(len(shapes) >= 2 * len(names), "recording: steps", len(shapes), allowed)
        values = np.array([[FEATURES[name](shape) for name in names] for shape in shapes])
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
    """Fit measured [steps] as values [steps, features] @ costs, by absolute relative errors."""
    from scipy.optimize import nnls

    relative = values / measured[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), np.finfo(np.float64).tiny)
    scaled = relative / scale
    weights = np.ones(len(measured))
    for _ in range(ROUNDS):
        costs, _ = nnls(scaled * weights[:, None], weights)
        errors = np.abs(scaled @ costs - 1)
        weights = 1 / np.sqrt(np.maximum(errors, LEAST_ERROR))
    result: Float64 = costs / scale
    return result


@dataclass(frozen=True)
class FitError:
    """Relative errors of predicted step times."""

    p50: float
    p90: float
    of_p50: float  # predicted median over measured median, less 1
    num_steps: int

    @classmethod
    def of(cls, predicted: Sequence[float], measured: Sequence[float]) -> FitError:
        guess, true = np.array(predicted), np.array(measured)
        errors = np.abs(guess / true - 1)
        p50, p90 = np.percentile(errors, (50, 90)).tolist()
        return cls(p50, p90, float(np.median(guess) / np.median(true) - 1), len(errors))

    def __str__(self) -> str:
        return (
            f"error of a step {self.p50:.1%} (p50), {self.p90:.1%} (p90), "
            f"of the median step {self.of_p50:+.1%}, {self.num_steps} steps"
        )

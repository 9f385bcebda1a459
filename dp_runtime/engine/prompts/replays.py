"""Experts that a request brings for its tokens, copied from what a user gave."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dp_runtime.core.request import RoutingShape
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.errors import require, shown

FIELD = "replay_routed_experts"


def copied_replay(
    given: object, shape: RoutingShape | None, longest: int, params: SamplingParams
) -> NDArray[np.int16] | None:
    """A copy of the caller's experts for up to `longest` positions; ValueError for what can't be.

    So is asking for experts where the engine keeps none.
    """
    off, keeps = "false unless the engine has enable_return_routed_experts", shape is not None
    require(keeps or not params.return_routed_experts, "return_routed_experts", True, off)
    if given is None:
        return None
    off = "None unless the engine has enable_return_routed_experts, and torch as its moe_backend"
    require(shape is not None and shape.may_replay, FIELD, shown(given, 40), off)
    assert shape is not None, "checked above"
    cut = params.truncate_prompt_tokens
    alone = f"None with {FIELD}, whose positions would move"
    require(cut is None, "truncate_prompt_tokens", cut, alone)
    values = _integers(given)
    ok = values.ndim == 3 and values.shape[1:] == shape.of_token and 0 < len(values) <= longest
    allowed = f"shape (n, {shape.num_layers}, {shape.top_k}), n in 1..{longest}"
    require(ok, FIELD, values.shape, allowed)
    rows = values.reshape(-1, shape.top_k)
    _check_ids(rows, shape.num_experts)
    return np.array(values, np.int16, order="C")


def _check_ids(rows: NDArray[np.integer], num_experts: int) -> None:
    """Check [tokens * layers, top_k]: -1 in all places of a row, or other ids in each."""
    free = (rows == -1).all(-1)
    used = np.sort(rows[~free], -1)
    wrong = used[(used < 0) | (used >= num_experts)]
    ids = f"expert ids in 0..{num_experts - 1}, or -1 in all places of a token's layer"
    require(not len(wrong), FIELD, wrong[:1].tolist(), ids)
    twice = used[:, 1:][used[:, 1:] == used[:, :-1]]
    require(not len(twice), FIELD, twice[:1].tolist(), "each expert once in a token's layer")


def _integers(given: object) -> NDArray[np.integer]:
    try:
        values = np.asarray(given)
    except Exception:  # nested unevenly, or not to be read
        values = np.zeros(0)
    require(values.dtype.kind in "iu", FIELD, shown(given, 40), "an array of integers")
    return values

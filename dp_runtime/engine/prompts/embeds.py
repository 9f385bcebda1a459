"""Embeddings of a prompt, copied from what a user gave."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_runtime.errors import require, shown

ALLOWED = "an array of floats"


def copied_embeds(given: object, shape: tuple[int, int]) -> NDArray[np.float32]:
    """A copy of the caller's array, tensor or nested lists, as contiguous float32.

    ValueError unless it has this shape and finite floats; integers may be token ids or quantized.
    """
    values = given.detach() if isinstance(given, Tensor) else _array(given)
    ok = values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
    require(ok, "prompt_embeds", str(values.dtype), ALLOWED)
    require(
        tuple(values.shape) == shape, "prompt_embeds", tuple(values.shape),
        f"shape {shape}: one row of hidden_size per embed position",
    )  # fmt: skip
    if isinstance(values, Tensor):
        values = _on_host(values)
    with np.errstate(over="ignore"):  # too large a double becomes inf
        copy = np.array(values, np.float32, order="C")
    require(bool(np.isfinite(copy).all()), "prompt_embeds", "NaN or inf", "finite values")
    return copy


def _array(given: object) -> NDArray[np.generic]:
    try:
        if not isinstance(given, np.ma.MaskedArray):
            return np.asarray(given)
    except Exception:  # nested unevenly or too deeply, or not to be read
        pass
    raise ValueError(f"prompt_embeds: {shown(given, 40)} is not allowed; {ALLOWED}")


def _on_host(tensor: Tensor) -> NDArray[np.float32]:
    try:
        return tensor.to("cpu", torch.float32).numpy()
    except Exception:  # sparse, quantized, or on a device without values
        kind = f"{tensor.layout} on {tensor.device}"
    raise ValueError(f"prompt_embeds: {kind} is not allowed; a dense tensor of floats")

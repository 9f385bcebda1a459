"""The experts that a request's tokens went to, as they are sent."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO

import numpy as np

from dp_runtime.engine.async_handle import AsyncRequestHandle


def encoded_experts(handle: AsyncRequestHandle) -> str | None:
    """Encode those of a finished request: base64 of a .npy file, as vLLM sends it."""
    output = handle.output
    if output is None or output.routed_experts is None:
        return None
    file = BytesIO()
    np.save(file, output.routed_experts)
    return b64encode(file.getvalue()).decode()

"""Images of prompts for tests in which nobody looks at their pixels."""

from __future__ import annotations

import numpy as np

from dp_runtime.core.request import PromptImage


def prompt_image(rows: int, columns: int, start: int = 0, seed: int = 0) -> PromptImage:
    """An image of so many tokens at its place; equal seeds and shapes are equal images."""
    patches = np.full((4 * rows * columns, 768), seed, np.uint8)
    return PromptImage(start, rows, columns, patches, bytes((rows, columns, seed)))

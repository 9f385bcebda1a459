"""The three positions of each token of a prompt with images, by which it is rotated (mRoPE)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dp_runtime.core.batch import Int64
from dp_runtime.core.request import PromptImage


def rope_positions(num_tokens: int, images: Sequence[PromptImage]) -> tuple[Int64, int]:
    """Return time, height and width of a prompt's tokens [3, tokens], and the delta after them.

    An image's tokens have one time, and rows and columns from there on; what follows begins behind
    its longer side (arXiv 2409.12191, section 2.1). A later token is at its index plus the delta.
    """
    positions = np.empty((3, num_tokens), np.int64)
    index = at = 0
    for image in images:
        text = image.start - index
        positions[:, index : image.start] = np.arange(at, at + text)
        at += text
        row, column = np.divmod(np.arange(image.num_tokens), image.columns)
        positions[:, image.start : image.end] = at + np.stack((0 * row, row, column))
        at += max(image.rows, image.columns)
        index = image.end
    positions[:, index:] = np.arange(at, at + num_tokens - index)
    return positions, at - index

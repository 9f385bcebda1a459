"""From one token that stands for an image in a text to one for each of the image's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dp_runtime.core.request import PromptImage

Tokens = tuple[int, ...]


def expanded(
    tokens: Tokens, images: Sequence[PromptImage], image_token_id: int
) -> tuple[Tokens, tuple[PromptImage, ...]]:
    """Repeat the token that stands for each image, and place the images; neighbours stay apart."""
    parts, placed = list[int](), list[PromptImage]()
    left: Iterator[PromptImage] = iter(images)
    for token in tokens:
        if token == image_token_id:
            image = replace(next(left), start=len(parts))
            placed.append(image)
            parts += [token] * image.num_tokens
        else:
            parts.append(token)
    assert len(placed) == len(images), f"{len(images)} images, {len(placed)} tokens for them"
    return tuple(parts), tuple(placed)

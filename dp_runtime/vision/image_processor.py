"""ImageProcessor: what a user gives as an image, as the patches that a rank's encoder reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from dp_runtime.core.request import ImageFormat, PromptImage
from dp_runtime.errors import not_allowed, one_line, require, shown

if TYPE_CHECKING:
    from PIL.Image import Image

INSTALL = "pip install 'dp-runtime[vision]'"
KINDS = "a PIL image, the bytes of an image file, or its path"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")  # PIL's: 8 bits a channel at most
MAX_PIXELS = 2**26  # before it is resized: a small file may hold a huge image
MAX_ASPECT = 200
DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class ImageProcessor:
    """Resizes and cuts images by transformers' processor; ranks rescale and centre the bytes."""

    format: ImageFormat

    def __call__(self, field: str, given: object) -> PromptImage:
        """Prepare one image, whose place is not known yet; ValueError naming the field."""
        for library in ("PIL", "transformers"):
            installed = find_spec(library) is not None
            require(installed, field, _name(given), f"none without {library}: {INSTALL}")
        image = _decoded(field, given)
        found = self._library(image, return_tensors="np")
        _, rows, columns = (int(size) for size in found["image_grid_thw"][0])
        patches = self._one_frame(found["pixel_values"])
        side, count = self.format.merge_size, len(patches) // self.format.merge_size**2
        require(
            count <= self.format.max_tokens, field, f"{image.width} x {image.height} pixels",
            f"a shape that comes to at most {self.format.max_tokens} tokens, not {count}",
        )  # fmt: skip
        digest = blake2b(f"{rows} x {columns} ".encode(), digest_size=DIGEST_BYTES)
        digest.update(patches.data)
        return PromptImage(0, rows // side, columns // side, patches, digest.digest())

    @cached_property
    def _library(self) -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        own = self.format
        return Qwen2VLImageProcessorPil(
            size={"shortest_edge": own.min_pixels, "longest_edge": own.max_pixels},
            patch_size=own.patch_size,
            merge_size=own.merge_size,
            temporal_patch_size=1,
            do_rescale=False,
            do_normalize=False,
        )

    def _one_frame(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        patches = values.astype(np.uint8)
        assert np.array_equal(patches, values), "resized pixels are whole numbers in 0..255"
        return np.ascontiguousarray(patches)


def _decoded(field: str, given: object) -> Image:
    """Decode an image, in memory of its size; ValueError if it is none, or not one of ours."""
    from PIL import Image

    ok = isinstance(given, (Image.Image, bytes, str, os.PathLike))
    require(ok, field, given, KINDS)
    with _as_value_error(field, given):
        match given:
            case Image.Image():
                image = given
            case bytes():
                image = Image.open(BytesIO(given), formats=FORMATS)
            case _:
                image = Image.open(os.fspath(given), formats=FORMATS)  # type: ignore[call-overload]
        frames = getattr(image, "n_frames", 1)
    _check(field, _name(given), image, frames)
    with _as_value_error(field, given):
        image.load()
        return image.convert("RGB")


@contextmanager
def _as_value_error(field: str, given: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        why = one_line(f"{type(error).__name__}: {error}", 120)
        allowed = f"a readable image ({', '.join(FORMATS)}); {why}"
        raise not_allowed(field, _name(given), allowed) from None


def _check(field: str, name: str, image: Image, frames: int) -> None:
    width, height = image.size
    require(image.mode in MODES, field, f"{name}, mode {image.mode}", f"one of {', '.join(MODES)}")
    require(frames == 1, field, f"{name}, {frames} frames", "a single frame")
    size = f"{name}, {width} x {height} pixels"
    require(0 < width * height <= MAX_PIXELS, field, size, f"1..{MAX_PIXELS:,} pixels")
    longer, shorter = max(width, height), min(width, height)
    allowed = f"sides of which one is at most {MAX_ASPECT} times the other"
    require(longer <= MAX_ASPECT * shorter, field, size, allowed)


def _name(given: object) -> str:
    return f"{len(given):,} bytes" if isinstance(given, bytes) else shown(given, 80)

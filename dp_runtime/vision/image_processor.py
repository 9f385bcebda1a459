"""ImageProcessor: what a user gives as an image, as the patches that a rank's encoder reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "I;16")  # PIL's
MAX_PIXELS = 2**26  # before it is resized: a small file may hold a huge image
MAX_ASPECT = 200
DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class ImageProcessor:
    """Resizes and cuts images by transformers' processor; ranks rescale and centre the bytes."""

    format: ImageFormat
    max_file_pixels: int = MAX_PIXELS

    def __call__(
        self, field: str, given: object, formats: tuple[str, ...] = FORMATS
    ) -> PromptImage:
        """Prepare one image, whose place is not known yet; ValueError naming the field.

        formats: those that the content of a file may have.
        """
        missing = self._missing
        require(not missing, field, _name(given), f"none without {', '.join(missing)}: {INSTALL}")
        image = self._decoded(field, given, formats)
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

    def warm_up(self) -> None:
        """Import the libraries, if they are installed: the first image would wait for seconds."""
        if not self._missing:
            from PIL import Image

            side = self.format.patch_size * self.format.merge_size
            self("image", Image.new("RGB", (side, side)))

    @property
    def _missing(self) -> list[str]:
        return [library for library in ("PIL", "transformers") if find_spec(library) is None]

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

    def _decoded(self, field: str, given: object, formats: tuple[str, ...]) -> Image:
        """Decode an image, in memory of its size; ValueError if it is none, or not one of ours."""
        from PIL import Image

        ok = isinstance(given, (Image.Image, bytes, str, os.PathLike))
        require(ok, field, given, KINDS)
        with _as_value_error(field, given, formats):
            image = _opened(given, formats)
        self._check(field, _name(given), image)
        with _as_value_error(field, given, formats):
            moves = _moves(image)
        require(not moves, field, f"{_name(given)}, an animation", "a single frame")
        with _as_value_error(field, given, formats):
            image.load()
            return _upright_rgb(image)

    def _check(self, field: str, name: str, image: Image) -> None:
        """Look at what the head of a file says, before anything has its size."""
        mode, (width, height) = f"{name}, mode {image.mode}", image.size
        require(image.mode in MODES, field, mode, f"one of {', '.join(MODES)}")
        size = f"{name}, {width} x {height} pixels"
        most = self.max_file_pixels
        require(0 < width * height <= most, field, size, f"1..{most:,} pixels")
        longer, shorter = max(width, height), min(width, height)
        allowed = f"sides of which one is at most {MAX_ASPECT} times the other"
        require(longer <= MAX_ASPECT * shorter, field, size, allowed)

    def _one_frame(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        patches = values.astype(np.uint8)
        assert np.array_equal(patches, values), "resized pixels are whole numbers in 0..255"
        return np.ascontiguousarray(patches)


@contextmanager
def _as_value_error(field: str, given: object, formats: tuple[str, ...]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        why = one_line(f"{type(error).__name__}: {error}", 120).split(" <_io")[0]
        allowed = f"a readable image ({', '.join(formats)}); {why}"
        raise not_allowed(field, _name(given), allowed) from None


def _opened(given: object, formats: tuple[str, ...]) -> Image:
    """Read the head of an image, or take one that was opened."""
    from PIL import Image

    match given:
        case Image.Image():
            return given
        case bytes():
            return Image.open(BytesIO(given), formats=formats)
    return Image.open(os.fspath(given), formats=formats)  # type: ignore[call-overload]


def _moves(image: Image) -> bool:
    """Tell whether there are frames; in a JPEG of a phone a preview stands behind the picture."""
    return image.format != "MPO" and getattr(image, "is_animated", False)


def _upright_rgb(image: Image) -> Image:
    """The picture as a viewer shows it: upright, on white where transparent; 16 bits as 8."""
    from PIL import Image, ImageOps

    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    with suppress(SyntaxError):  # no EXIF, though it is called so: as viewers, show it as it lies
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _name(given: object) -> str:
    return f"{len(given):,} bytes" if isinstance(given, bytes) else shown(given, 80)

"""What users give as images: the patches of transformers' processor, or one clear line."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dp_runtime.core.request import ImageFormat
from dp_runtime.runner.image_encoding import ImageEncoding
from dp_runtime.vision.image_processor import ImageProcessor

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
FORMAT = ImageFormat((1, 2, 3), 16, 2, 32 * 32 * 4, 32 * 32 * 100, 1 / 255, MEAN, STD)
PROCESSOR = ImageProcessor(FORMAT)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "image",
    [noise(64, 96), noise(150, 220), noise(700, 333), noise(1, 1), noise(900, 5),
     noise(40, 40, "L"), noise(50, 70, "RGBA"), noise(33, 65, "P"),
     noise(80, 80, "1"), noise(90, 60, "LA"), noise(70, 40, "CMYK")],
    ids=lambda image: f"{image.mode} {image.size}",
)  # fmt: skip
def test_patches_are_those_of_the_library(image: Image.Image) -> None:
    library = Qwen2VLImageProcessorPil(
        size={"shortest_edge": FORMAT.min_pixels, "longest_edge": FORMAT.max_pixels},
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    expected = library(image, return_tensors="pt")
    found = PROCESSOR("image", image)
    frames = torch.from_numpy(found.patches)
    encoder: Any = None
    values = ImageEncoding(encoder, FORMAT, torch.zeros(0, 4), 1).normalised(frames)
    both = values.view(len(values), 3, 1, -1).expand(-1, -1, 2, -1).flatten(1)
    torch.testing.assert_close(both, expected["pixel_values"], atol=1e-6, rtol=0)
    assert expected["image_grid_thw"].tolist() == [[1, 2 * found.rows, 2 * found.columns]]
    assert found.num_tokens <= FORMAT.max_tokens


def test_the_same_pixels_are_the_same_image_however_they_come(tmp_path: Path) -> None:
    image, path = noise(70, 50), tmp_path / "image.png"
    image.save(path)
    kinds = [image, encoded(image), str(path), path, encoded(image, "BMP"),
             encoded(image, "WEBP", lossless=True)]  # fmt: skip
    assert len({PROCESSOR("image", kind).digest for kind in kinds}) == 1
    others = [noise(71, 50), encoded(image, "JPEG"), image.rotate(180)]
    digests = {PROCESSOR("image", kind).digest for kind in [image, *others]}
    assert len(digests) == 4


def test_shapes_of_equal_pixels_differ() -> None:
    wide, tall = (Image.new("RGB", size, (7, 7, 7)) for size in ((64, 128), (128, 64)))
    assert PROCESSOR("image", wide).digest != PROCESSOR("image", tall).digest


def gif() -> bytes:
    return encoded(noise(9, 9), "GIF", save_all=True, append_images=[noise(8, 9)])


def closed() -> Image.Image:
    image = Image.open(BytesIO(encoded(noise(9, 9))))
    image.close()
    return image


def bomb() -> bytes:
    return encoded(Image.new("1", (9000, 9000)))


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "a number": (lambda: 5, r"images\[1\]: 5 is not allowed; a PIL image, the bytes"),
    "nothing": (lambda: None, "None is not allowed"),
    "an array": (lambda: np.zeros((4, 4, 3)), "a PIL image, the bytes of an image file, or its"),
    "no bytes": (lambda: b"", "'0 bytes' is not allowed; a readable image"),
    "text": (lambda: b"hello" * 9, "'45 bytes' is not allowed; a readable image .*cannot identify"),
    "truncated": (lambda: encoded(noise(90, 90))[:-500], "bytes' is not allowed; .*truncated"),
    "svg": (lambda: b"<svg/>", "PNG, JPEG, WEBP, GIF, BMP"),
    "no file": (lambda: "/nowhere/image.png", "nowhere/image.png.*FileNotFoundError"),
    "a directory": (lambda: Path("/tmp"), "IsADirectoryError"),
    "animated": (gif, "an animation' is not allowed; a single frame"),
    "32 bits": (lambda: Image.new("I", (9, 9)), "mode I' is not allowed; one of 1, L"),
    "closed": (closed, "is not allowed; a readable image"),
    "too thin": (lambda: noise(1, 201), "1 x 201 pixels' is not allowed; sides of which one"),
    "a bomb": (bomb, r"9000 x 9000 pixels' is not allowed; 1\.\.67,108,864 pixels"),
    "empty": (lambda: Image.new("RGB", (0, 5)), "0 x 5 pixels' is not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_one_line(name: str) -> None:
    make, text = BAD[name]
    with pytest.raises(ValueError, match=text) as caught:
        PROCESSOR("images[1]", make())
    message = str(caught.value)
    assert re.match(r"images\[1\]: ", message)
    assert "\n" not in message
    assert len(message) < 400


def test_sixteen_bits_are_read_as_their_upper_eight() -> None:
    values = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32
    deep, flat = Image.fromarray(values), Image.fromarray((values >> 8).astype(np.uint8))
    assert PROCESSOR("image", encoded(deep)).digest == PROCESSOR("image", flat).digest


def test_what_is_transparent_is_white() -> None:
    """Drawings come as black lines on transparent black."""
    lines = Image.new("RGBA", (64, 64))
    lines.paste((0, 0, 0, 255), (0, 20, 64, 30))
    shown = Image.new("RGB", (64, 64), "white")
    shown.paste((0, 0, 0), (0, 20, 64, 30))
    palette = Image.new("P", (64, 64), 3)
    palette.putpalette(bytes(768))
    palette.paste(5, (0, 20, 64, 30))
    expected = PROCESSOR("image", shown).digest
    assert PROCESSOR("image", encoded(lines)).digest == expected
    assert PROCESSOR("image", encoded(palette, transparency=3)).digest == expected
    gray = lines.convert("LA")
    assert PROCESSOR("image", encoded(gray)).digest == expected


def test_a_picture_is_upright() -> None:
    image, exif = noise(70, 50), Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned
    turned = image.transpose(Image.Transpose.ROTATE_270)
    found = PROCESSOR("image", encoded(image, exif=exif))
    assert found.digest == PROCESSOR("image", turned).digest


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_an_exif_that_is_none_turns_nothing(file_format: str) -> None:
    image = Image.new("RGB", (70, 50), "red")
    found, due = (
        PROCESSOR("image", encoded(image, file_format, **extra))
        for extra in ({"exif": b"Exif\0\0none"}, {})
    )
    assert found.digest == due.digest


def test_a_preview_behind_the_picture_of_a_phone_is_no_animation() -> None:
    image = noise(64, 64)
    photo = encoded(image, "MPO", save_all=True, append_images=[noise(9, 9)])
    assert PROCESSOR("image", photo, ("JPEG",)).num_tokens == PROCESSOR("image", image).num_tokens


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    given = bomb()
    monkeypatch.setattr(ImageFile.ImageFile, "load", pytest.fail)
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        PROCESSOR("image", given)


def test_a_shape_that_comes_to_too_many_tokens_is_refused() -> None:
    small = ImageProcessor(ImageFormat((1, 2, 3), 16, 2, 1024, 8 * 1024, 1 / 255, MEAN, STD))
    with pytest.raises(ValueError, match="at most 8 tokens, not") as caught:
        small("images[0]", noise(1900, 10))
    assert "1900 x 10 pixels" in str(caught.value)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dp_runtime.vision.image_processor.find_spec", lambda name: None)
    PROCESSOR.warm_up()
    install = r"none without PIL, transformers: pip install 'dp-runtime\[vision\]'"
    with pytest.raises(ValueError, match=install):
        PROCESSOR("images[0]", noise(9, 9))

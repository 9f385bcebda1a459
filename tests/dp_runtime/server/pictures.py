"""Files of images, good and bad, and what clients make of them."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from io import BytesIO
from typing import Any

from PIL import Image

Part = dict[str, Any]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def animated(image: Image.Image, kind: str) -> bytes:
    others = [image.transpose(Image.Transpose.ROTATE_180)]
    return encoded(image, kind, save_all=True, append_images=others)


def data_url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{b64encode(content).decode()}"


def part(content: bytes, mime: str = "image/png") -> Part:
    return url_part(data_url(content, mime))


def url_part(url: object, **more: object) -> Part:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def png(width: int, height: int, pixels: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A gray PNG of these sizes, which may be a lie, and of these pixels, which may be too few."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*one) for one in chunks)


def gif_head(width: int, height: int) -> bytes:
    """A GIF of one pixel that says it has these sizes."""
    small = encoded(Image.new("P", (1, 1)), "GIF")
    return small[:6] + struct.pack("<HH", width, height) + small[10:]


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum

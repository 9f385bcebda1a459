"""Pictures: grids of cells that each hold a coloured shape or nothing, drawn a bit differently
each time.

A cell is 32 x 32 pixels: one token of an image.
python -m examples.tiny_vl.pictures picture.png --seed 3 draws one and says what is in it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CELL = 32  # pixels of a side
MAX_SIDE = 4  # rows, and columns
MAX_ITEMS = 9
SIZES = range(20, 29, 2)  # pixels of a shape's side
COLOURS = {
    "red": (214, 32, 38), "green": (34, 152, 66), "blue": (38, 84, 214), "yellow": (250, 214, 24),
    "orange": (250, 138, 20), "purple": (128, 44, 160), "pink": (250, 150, 190),
    "brown": (124, 76, 36), "gray": (150, 150, 150), "black": (16, 16, 16),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
Pixels = np.ndarray[Any, np.dtype[np.float32]]
Place = tuple[int, int]  # a row and a column, from 0


@dataclass(frozen=True)
class Item:
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    rows: int
    columns: int
    cells: tuple[Item | None, ...]  # row by row

    def items(self) -> Iterator[tuple[Place, Item]]:
        for index, item in enumerate(self.cells):
            if item is not None:
                yield divmod(index, self.columns), item


def draw_scene(rng: Random, rows: int | None = None, columns: int | None = None) -> Scene:
    """Draw what a picture shows: some colours and shapes come often in it, so there is to count."""
    rows = rows or rng.randint(2, MAX_SIDE)
    columns = columns or rng.randint(2, MAX_SIDE)
    num_cells = rows * columns
    colours = rng.sample(tuple(COLOURS), rng.randint(2, 6))
    shapes = rng.sample(SHAPES, rng.randint(2, 6))
    count = rng.randint(min(2, num_cells), min(num_cells, MAX_ITEMS))
    cells: list[Item | None] = [None] * num_cells
    for index in rng.sample(range(num_cells), count):
        cells[index] = Item(rng.choice(colours), rng.choice(shapes))
    return Scene(rows, columns, tuple(cells))


def draw_picture(scene: Scene, rng: Random) -> Image.Image:
    """Draw a scene: sizes, places within cells and shades vary."""
    canvas = np.full((scene.rows * CELL, scene.columns * CELL, 3), rng.uniform(240, 255))
    canvas = canvas.astype(np.float32)
    canvas[::CELL] = canvas[:, ::CELL] = 215  # lines between cells
    for (row, column), item in scene.items():
        mask = mask_of(item.shape, rng.choice(SIZES))
        room = CELL - len(mask)
        top, left = (CELL * at + rng.randint(1, room - 1) for at in (row, column))
        part = canvas[top : top + len(mask), left : left + len(mask)]
        shade = [min(255.0, max(0.0, c + rng.uniform(-12, 12))) for c in COLOURS[item.colour]]
        part += mask[:, :, None] * (np.array(shade, np.float32) - part)
    return Image.fromarray(canvas.round().astype(np.uint8))


@lru_cache
def mask_of(shape: str, size: int) -> Pixels:
    """How much of each pixel a shape covers, [size, size] in 0..1."""
    fine = 8
    image = Image.new("L", (size * fine, size * fine))
    draw_shape(ImageDraw.Draw(image), shape, size * fine - 1)
    small = image.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, size: float) -> None:
    """Draw a white shape on black."""
    half, third = size / 2, size / 3
    match shape:
        case "circle":
            draw.ellipse((0, 0, size, size), 255)
        case "square":
            draw.rectangle((size * 0.06, size * 0.06, size * 0.94, size * 0.94), 255)
        case "triangle":
            draw.polygon([(half, 0), (size, size), (0, size)], 255)
        case "diamond":
            draw.polygon([(half, 0), (size * 0.86, half), (half, size), (size * 0.14, half)], 255)
        case "star":
            tips = [(0.5, i / 5) if i % 2 == 0 else (0.2, i / 5) for i in range(10)]
            draw.polygon(
                [
                    (
                        half + size * r * math.sin(math.pi * a),
                        half - size * r * math.cos(math.pi * a),
                    )
                    for r, a in tips
                ],
                255,
            )
        case "cross":
            draw.rectangle((third, 0, size - third, size), 255)
            draw.rectangle((0, third, size, size - third), 255)
        case "ring":
            draw.ellipse((0, 0, size, size), 255)
            draw.ellipse((size * 0.25, size * 0.25, size * 0.75, size * 0.75), 0)
        case "heart":
            draw.ellipse((0, 0, size * 0.54, size * 0.54), 255)
            draw.ellipse((size * 0.46, 0, size, size * 0.54), 255)
            draw.polygon([(size * 0.05, size * 0.4), (size * 0.95, size * 0.4), (half, size)], 255)
        case _:
            raise AssertionError(f"shape {shape}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = Random(args.seed)
    scene = draw_scene(rng)
    draw_picture(scene, rng).save(args.file)
    for (row, column), item in scene.items():
        print(f"row {row + 1} column {column + 1}: {item.colour} {item.shape}")


if __name__ == "__main__":
    main()

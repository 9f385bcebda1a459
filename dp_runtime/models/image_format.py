"""How a model wants its images: preprocessor_config.json, else what the family has published."""

from __future__ import annotations

from pathlib import Path

from dp_runtime.core.plain_values import plain_float
from dp_runtime.core.request import ImageFormat
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.vision.config import VisionConfig
from dp_runtime.weights.files import is_present

FILES = ("preprocessor_config.json", "processor_config.json")  # the latter in a section
SECTION = "image_processor"
MIN_PIXELS, MAX_PIXELS = 2**16, 2**24
BICUBIC = 3
MIN_STD, MAX_CHANNEL = 1e-3, 1e3
IRRELEVANT = (
    "processor_class", "image_processor_type", "data_format", "input_data_format", "device",
    "return_tensors", "disable_grouping", "default_to_square", "crop_size", "pad_size",
    "image_seq_length", "auto_map", "_valid_processor_keys",
)  # fmt: skip


def read_image_format(
    directory: str, vision: VisionConfig, max_pixels: int | None = None
) -> ImageFormat:
    """Read how images are prepared; ValueError for what is done otherwise here."""
    fields = _find(Path(directory))
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        fields.only(name, True)
    for name in ("do_center_crop", "do_pad"):
        fields.only(name, False)
    fields.only("resample", BICUBIC)
    for name, size in (
        ("patch_size", vision.patch_size), ("temporal_patch_size", vision.num_frames),
        ("merge_size", vision.merge_size),
    ):  # fmt: skip
        fields.only(name, size)
    least, most = _pixels(fields)
    fields.skip(IRRELEVANT)
    side = vision.patch_size * vision.merge_size
    made = ImageFormat(
        image_token_ids=vision.image_token_ids,
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        min_pixels=min(least, max_pixels or most),
        max_pixels=min(most, max_pixels or most),
        rescale_factor=fields.number("rescale_factor", 1 / 255),
        mean=_channels(fields, "image_mean", vision.in_channels, 0.0),
        std=_channels(fields, "image_std", vision.in_channels, MIN_STD),
    )
    fields.finish()
    fields.require(made.max_tokens > 0, "size", made.max_pixels, f"at least {side**2} pixels")
    return made


def _find(root: Path) -> ConfigFields:
    for name in FILES:
        if is_present(root / name):
            fields = ConfigFields.read(root / name)
            section = fields.section(SECTION)
            if section is not None or name == FILES[0]:
                return section or fields
    return ConfigFields(FILES[0], {})


def _pixels(fields: ConfigFields) -> tuple[int, int]:
    size = fields.section("size")  # its "edges" are areas
    least = fields.integer("min_pixels", MIN_PIXELS)
    most = fields.integer("max_pixels", MAX_PIXELS)
    if size is not None:
        least = size.integer("shortest_edge", least)
        most = size.integer("longest_edge", most)
        size.finish()
    fields.require(least <= most, "size", (least, most), "the least pixels, then the most")
    return least, most


def _channels(fields: ConfigFields, name: str, count: int, least: float) -> tuple[float, ...]:
    given = fields.get(name, [0.5] * count)
    values = [plain_float(value) for value in given] if isinstance(given, list) else []
    ok = len(values) == count and all(v is not None and least <= v <= MAX_CHANNEL for v in values)
    fields.require(ok, name, given, f"{count} numbers in {least:g}..{MAX_CHANNEL:g}")
    return tuple(value for value in values if value is not None)

"""How images are to be prepared, and what else a vision encoder may be said to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dp_runtime.core.request import ImageFormat
from dp_runtime.models.image_format import read_image_format
from dp_runtime.models.registry import read_model_config
from tests.dp_runtime.models.test_hybrid_config import (
    QWEN_122B,
    ROPE,
    VISION,
    Fields,
    parse,
    with_text,
)

PUBLISHED: Fields = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16,
    "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}  # fmt: skip


def read(directory: Path, **files: Any) -> ImageFormat:
    vision = parse(directory, QWEN_122B).vision
    assert vision is not None
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return read_image_format(str(directory), vision)


def test_what_is_published_is_the_default(tmp_path: Path) -> None:
    default = read(tmp_path)
    assert default == read(tmp_path, preprocessor_config=PUBLISHED)
    assert (default.min_pixels, default.max_pixels, default.max_tokens) == (2**16, 2**24, 16384)
    assert default.image_token_ids == (248053, 248056, 248054)
    assert (default.mean, default.std) == ((0.5,) * 3, (0.5,) * 3)


def test_either_file_and_either_spelling(tmp_path: Path) -> None:
    flat = PUBLISHED | {"size": None, "min_pixels": 4096, "max_pixels": 10240}
    found = read(tmp_path, processor_config={"image_processor": flat, "video_processor": {}})
    assert (found.min_pixels, found.max_pixels, found.max_tokens) == (4096, 10240, 10)
    assert read(tmp_path, preprocessor_config=PUBLISHED).max_tokens == 16384
    vision = read_model_config(str(tmp_path)).vision
    assert vision is not None
    limited = read_image_format(str(tmp_path), vision, 32 * 32 * 6)
    assert (limited.min_pixels, limited.max_tokens) == (6144, 6)


FILES: dict[str, tuple[Fields, str]] = {
    "another size of patches": ({"patch_size": 14}, "patch_size: 14 is not allowed"),
    "another order": ({"do_rescale": False}, "do_rescale: False is not allowed; only true"),
    "nearest": ({"resample": 0}, "resample: 0"),
    "crop": ({"do_center_crop": True}, "do_center_crop: True"),
    "reversed": ({"size": {"shortest_edge": 9000, "longest_edge": 5000}}, "size: (9000, 5000)"),
    "too small": ({"size": {"shortest_edge": 9, "longest_edge": 99}}, "size: 99 is not allowed"),
    "height": ({"size": {"height": 9, "width": 9}}, "size: height: 9"),
    "means": ({"image_mean": [0.5]}, "image_mean: [0.5] is not allowed; 3 numbers"),
    "no std": ({"image_std": [0.5, 0, 0.5]}, "image_std: "),
    "unknown": ({"sharpen": 2}, "sharpen: 2 is not allowed; this field is not supported"),
}


@pytest.mark.parametrize("name", FILES)
def test_other_ways_to_prepare_images_are_refused(name: str, tmp_path: Path) -> None:
    fields, text = FILES[name]
    with pytest.raises(ValueError, match=r"^preprocessor_config\.json: ") as caught:
        read(tmp_path, preprocessor_config=PUBLISHED | fields)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def with_vision(**changes: Any) -> Fields:
    return QWEN_122B | {"vision_config": VISION | changes}


CONFIGS: dict[str, tuple[Fields, str]] = {
    "deepstack": (with_vision(deepstack_visual_indexes=[5]), "deepstack_visual_indexes: [5]"),
    "another type": (with_vision(model_type="siglip"), "vision_config: model_type: 'siglip'"),
    "another act": (with_vision(hidden_act="relu"), "hidden_act: 'relu'"),
    "heads": (with_vision(num_heads=7), "num_heads: 7"),
    "positions": (with_vision(num_position_embeddings=2000), "num_position_embeddings: 2000"),
    "width": (with_vision(out_hidden_size=4096), "out_hidden_size: 4096"),
    "rope": (with_vision(rope_parameters={"rope_type": "default"}), "vision_config: rope_param"),
    "token": (QWEN_122B | {"image_token_id": 10**6}, "image_token_id: 1000000"),
    "blocks": (with_text(rope_parameters=ROPE | {"mrope_interleaved": False}), "mrope_interleaved"),
    "section": (
        with_text(rope_parameters=ROPE | {"mrope_section": [8, 8, 8]}),
        "section: [8",
    ),
    "two": (with_text(rope_parameters=ROPE | {"mrope_section": [16, 16]}), "mrope_section: [16"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_encoders_and_positions_are_refused(name: str, tmp_path: Path) -> None:
    fields, text = CONFIGS[name]
    with pytest.raises(ValueError, match=r"^config\.json: ") as caught:
        parse(tmp_path, fields)
    assert text in str(caught.value)
    text_only = parse(tmp_path, fields | {"language_model_only": True})
    assert (text_only.vision, text_only.rope.mrope_section) == (None, ())


def test_the_encoder_of_a_published_file(tmp_path: Path) -> None:
    config = parse(tmp_path, QWEN_122B)
    vision = config.vision
    assert vision is not None
    assert (vision.depth, vision.hidden_size, vision.head_dim) == (27, 1152, 72)
    assert (vision.positions_per_side, vision.patch_values) == (48, 768)
    assert config.rope.mrope_section == (11, 11, 10)
    assert parse(tmp_path, QWEN_122B | {"vision_config": None}).vision is None

"""The vision encoder of the family, and the positions by which its features are rotated."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.moe_decoder import warn_of_unknown
from dp_runtime.models.qwen3_5.config import HybridConfig
from dp_runtime.vision.config import VisionConfig

SECTION = (11, 11, 10)  # of 32 pairs of dimensions, where the file does not say
AXIAL = {"rope_type": "axial", "rope_theta": 10_000.0}
MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_vision")


def with_vision(whole: ConfigFields, text: ConfigFields, config: HybridConfig) -> HybridConfig:
    """Add the encoder that config.json describes, if it has one."""
    fields = whole.section("vision_config")
    if whole.boolean("language_model_only", False) or fields is None:
        return config
    vision = parse_vision(fields, config.hidden_size, parse_image_tokens(whole, config))
    section = parse_section(text, int(config.head_dim * config.rope.fraction) // 2)
    return replace(config, vision=vision, rope=replace(config.rope, mrope_section=section))


def parse_image_tokens(whole: ConfigFields, config: HybridConfig) -> tuple[int, int, int]:
    def token(name: str, default: int) -> int:
        found, size = whole.integer(name, default, minimum=0), config.vocab_size
        whole.require(found < size, name, found, f"below vocab_size {size}")
        return found

    return (
        token("vision_start_token_id", 248053), token("image_token_id", 248056),
        token("vision_end_token_id", 248054),
    )  # fmt: skip


def parse_vision(
    fields: ConfigFields, hidden_size: int, image_token_ids: tuple[int, int, int]
) -> VisionConfig:
    kind = fields.get("model_type", MODEL_TYPES[0])
    fields.require(kind in MODEL_TYPES, "model_type", kind, f"one of {', '.join(MODEL_TYPES)}")
    fields.only("hidden_act", "gelu_pytorch_tanh")
    fields.only("deepstack_visual_indexes", [])
    fields.only("rope_parameters", AXIAL)
    hidden, heads = fields.integer("hidden_size", 1152), fields.integer("num_heads", 16)
    fields.require(
        hidden % (4 * heads) == 0, "num_heads", heads,
        f"a quarter of a divisor of hidden_size {hidden}: a head is rotated by row and by column",
    )  # fmt: skip
    positions, out = fields.integer("num_position_embeddings", 2304), "out_hidden_size"
    side = isqrt(positions)
    fields.require(side**2 == positions, "num_position_embeddings", positions, "a square")
    fields.require(
        fields.integer(out, 3584) == hidden_size, out, fields.get(out),
        f"hidden_size {hidden_size} of the text model",
    )  # fmt: skip
    config = VisionConfig(
        depth=fields.integer("depth", 27),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 4304),
        num_heads=heads,
        in_channels=fields.integer("in_channels", 3),
        patch_size=fields.integer("patch_size", 16),
        num_frames=fields.integer("temporal_patch_size", 2),
        merge_size=fields.integer("spatial_merge_size", 2),
        positions_per_side=side,
        out_hidden_size=hidden_size,
        image_token_ids=image_token_ids,
    )
    warn_of_unknown(fields.finish_known({}))
    return config


def parse_section(text: ConfigFields, num_pairs: int) -> tuple[int, ...]:
    """Read how many pairs of dimensions time, height and width turn."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = text.section(name)
        if rope is not None and not rope.is_empty:
            break
    else:
        return SECTION
    rope.only("mrope_interleaved", True)
    section = rope.integers("mrope_section")
    ok = not section or (len(section) == 3 and sum(section) == num_pairs)
    allowed = f"three numbers that add up to {num_pairs}, the pairs of dimensions that are rotated"
    rope.require(ok, "mrope_section", list(section), allowed)
    return section or SECTION

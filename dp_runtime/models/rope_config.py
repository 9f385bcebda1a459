"""Rotary embedding fields of config.json, in the layouts of transformers 4 and 5."""

from __future__ import annotations

import math

from dp_runtime.layers.rotary import RopeConfig
from dp_runtime.models.hf_config import ConfigFields

TYPES = ("default", "linear", "yarn", "llama3")


def parse_rope(fields: ConfigFields, default_theta: float, max_positions: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4).

    default_theta: of the architecture, where neither layout names one. Raises ValueError for a
    type or a field that is not supported.
    """
    theta = fields.number("rope_theta", default_theta)
    parameters = fields.section("rope_parameters")
    scaling = fields.section("rope_scaling")
    fields.only("partial_rotary_factor", 1.0)
    section = parameters or scaling
    if section is None:
        return RopeConfig(theta=theta)
    kind = section.get("rope_type", section.get("type", "default"))
    section.skip(["type"])  # the older name stays beside rope_type in converted files
    section.require(kind in TYPES, "rope_type", kind, f"one of {', '.join(TYPES)}")
    section.only("partial_rotary_factor", 1.0)
    theta = section.number("rope_theta", theta)
    original = section.integer("original_max_position_embeddings", max_positions)
    match kind:
        case "linear":
            rope = RopeConfig("linear", theta, section.number("factor"))
        case "yarn":
            rope = _parse_yarn(section, theta, original, max_positions)
        case "llama3":
            rope = _parse_llama3(section, theta, original)
        case _:
            section.skip(["factor"])
            rope = RopeConfig(theta=theta)
    section.finish()
    return rope


def _parse_yarn(
    section: ConfigFields, theta: float, original: int, max_positions: int
) -> RopeConfig:
    factor = section.number("factor", max_positions / original)
    mscale, all_dim = section.get("mscale"), section.get("mscale_all_dim")
    attention = yarn_mscale(factor)
    if mscale and all_dim:
        numerator = yarn_mscale(factor, section.number("mscale"))
        attention = numerator / yarn_mscale(factor, section.number("mscale_all_dim"))
    return RopeConfig(
        "yarn", theta, factor, original,
        attention_factor=section.number("attention_factor", attention),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.boolean("truncate", True),
    )  # fmt: skip


def _parse_llama3(section: ConfigFields, theta: float, original: int) -> RopeConfig:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    section.require(low < high, "high_freq_factor", high, f"above low_freq_factor {low:g}")
    return RopeConfig(
        "llama3", theta, section.number("factor"), original,
        low_freq_factor=low, high_freq_factor=high,
    )  # fmt: skip


def max_context(rope: RopeConfig, max_positions: int) -> int:
    """Positions a model takes: published files leave max_position_embeddings as it was for YaRN."""
    if rope.type != "yarn":
        return max_positions
    return max(max_positions, int(rope.original_max_position_embeddings * rope.factor))


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Attention temperature of YaRN (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0

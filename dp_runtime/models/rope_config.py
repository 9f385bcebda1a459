"""Rotary embedding fields of config.json, resolved as transformers 5 does it.

`rope_scaling` (version 4) goes before `rope_parameters`, and a theta inside a section before one
beside it. A file in which this would drop a value is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dp_runtime.layers.rotary import RopeConfig
from dp_runtime.models.hf_config import MAX_INTEGERS, ConfigFields

TYPES = ("default", "linear", "yarn", "llama3")
ORIGINAL = "original_max_position_embeddings"
MAX_POSITIONS = MAX_INTEGERS["max_position_embeddings"]
MIN_FACTOR = 1e-3  # the frequencies are divided by it


FRACTION = "partial_rotary_factor"


@dataclass(frozen=True)
class RopeFamily:
    """What a family of models takes for fields that are absent, and which others it has."""

    theta: float
    fraction: float = 1.0  # of a head that is rotated; families with 1.0 know no other
    irrelevant: tuple[str, ...] = ()  # fields of a section that change nothing


def parse_rope(fields: ConfigFields, family: RopeFamily, max_positions: int) -> RopeConfig:
    fraction = _parse_fraction(fields, family.fraction, family)
    sections = [fields.section(name) for name in ("rope_scaling", "rope_parameters")]
    stated = [section for section in sections if section is not None and not section.is_empty]
    theta = fields.number("rope_theta", family.theta, minimum=1.0)
    found = list[RopeConfig]()
    for section in stated:
        own = _parse_fraction(section, fraction, family)
        section.require(
            own == fraction or FRACTION not in fields, FRACTION, own,
            f"the {FRACTION} of {fields.where} is {fraction:g}",
        )  # fmt: skip
        section.skip(family.irrelevant)
        found.append(replace(_parse_section(section, theta, max_positions), fraction=own))
    rope = found[0] if found else RopeConfig(theta=theta, fraction=fraction)
    if len(found) == 2:
        _require_same(stated[0], stated[1], rope, found[1])
    if ORIGINAL in fields:
        _require_original(fields, rope, max_positions)
    return rope


def _parse_fraction(fields: ConfigFields, default: float, family: RopeFamily) -> float:
    if family.fraction == 1.0:
        fields.only(FRACTION, 1.0)
        return 1.0
    fraction = fields.number(FRACTION, default)
    fields.require(fraction <= 1.0, FRACTION, fraction, "a number above 0, at most 1")
    return fraction


def _parse_section(section: ConfigFields, theta: float, max_positions: int) -> RopeConfig:
    kind = section.get(section.one_of("rope_type", "type"), "default")
    section.require(kind in TYPES, "rope_type", kind, f"one of {', '.join(TYPES)}")
    section.only("extrapolation_factor", 1.0)  # vLLM reads both; transformers neither
    section.only("attn_factor", 1.0)
    section.skip(["finetuned"])
    theta = section.number("rope_theta", theta, minimum=1.0)
    original = section.integer(ORIGINAL, max_positions)
    match kind:
        case "linear":
            rope = RopeConfig("linear", theta, section.number("factor", minimum=MIN_FACTOR))
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
    factor = section.number("factor", max_positions / original, minimum=MIN_FACTOR)
    section.require(
        factor * original <= MAX_POSITIONS, "factor", factor,
        f"at most {MAX_POSITIONS:,} positions, {ORIGINAL} of which is {original}",
    )  # fmt: skip
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
        truncate=section.boolean("truncate", not section.is_null("truncate")),
    )  # fmt: skip


def _parse_llama3(section: ConfigFields, theta: float, original: int) -> RopeConfig:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    section.require(low < high, "high_freq_factor", high, f"above low_freq_factor {low:g}")
    return RopeConfig(
        "llama3", theta, section.number("factor", minimum=MIN_FACTOR), original,
        low_freq_factor=low, high_freq_factor=high,
    )  # fmt: skip


def _require_same(
    old: ConfigFields, new: ConfigFields, taken: RopeConfig, other: RopeConfig
) -> None:
    partial = other.type == "default" and ("rope_theta" not in new or other.theta == taken.theta)
    old.require(
        partial or other == taken, "rope_type", taken.type,
        f"rope_parameters, which it replaces, has rope_type {other.type!r} with rope_theta "
        f"{other.theta:g}, where rope_scaling comes to {taken.theta:g}: leave one of both sections",
    )  # fmt: skip


def _require_original(fields: ConfigFields, rope: RopeConfig, max_positions: int) -> None:
    value, used = fields.integer(ORIGINAL), rope.original_max_position_embeddings or max_positions
    unused = rope.type in ("default", "linear")
    fields.require(
        unused or value == used, ORIGINAL, value,
        f"rope_parameters or rope_scaling comes to {used} with max_position_embeddings",
    )  # fmt: skip


def max_context(rope: RopeConfig, max_positions: int) -> int:
    """Return the context with YaRN, which published files leave out of max_position_embeddings."""
    if rope.type != "yarn":
        return max_positions
    return max(max_positions, int(rope.original_max_position_embeddings * rope.factor))


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Compute YaRN's attention temperature (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0

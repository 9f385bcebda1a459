"""quantization_config of config.json: e4m3 weights in blocks of 128 x 128, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from dp_runtime.layers.expert_layouts import ExpertNames
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.weights.fp8_blocks import BLOCK
from dp_runtime.weights.fp8_names import BESIDE_VISION, is_named

EXEMPT = "modules_to_not_convert", "ignored_layers"  # the same list by two names


def parse_fp8_experts(
    fields: ConfigFields, prefixes: Iterable[str], names: ExpertNames
) -> tuple[bool, ...]:
    """Tell for each layer's module of experts whether it is e4m3; other tensors tell themselves."""
    section = fields.section("quantization_config")
    if section is None or section.is_empty:
        return tuple(False for _ in prefixes)
    method, block = section.get("quant_method"), section.get("weight_block_size")
    section.require(method == "fp8", "quant_method", method, 'only "fp8" is supported')
    section.require(
        block == [BLOCK, BLOCK], "weight_block_size", block, f"only {[BLOCK, BLOCK]} is supported"
    )
    section.only("fmt", "e4m3")
    section.only("activation_scheme", "dynamic")  # activations are never quantised here
    section.only("scale_fmt", "float")
    section.only("expert_dtype", "fp8")
    section.skip(["dequantize"])  # how another library loads them
    section.only("modules_to_convert", [])
    section.only("weight_per_tensor", False)
    section.only("act_per_tensor", False)
    exempt = section.get(section.one_of(*EXEMPT), [])
    ok = isinstance(exempt, list) and all(isinstance(name, str) for name in exempt)
    section.require(ok, "modules_to_not_convert", exempt, "a list of module names")
    section.finish()
    exempt = [name.replace(BESIDE_VISION, "") for name in exempt]
    parts = (names.gate, names.up, names.down)
    return tuple(
        not any(is_named(f"{prefix}.0.{part}", exempt) for part in parts) for prefix in prefixes
    )


def parse_fp8_exempt(fields: ConfigFields) -> tuple[str, ...] | None:
    """List the modules that an e4m3 checkpoint has in another type; None: it has none in e4m3."""
    section = fields.section("quantization_config")
    if section is None or section.is_empty:
        return None
    names = section.get(section.one_of(*EXEMPT), [])
    return tuple(name.replace(BESIDE_VISION, "") for name in names)

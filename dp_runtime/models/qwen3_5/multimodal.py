"""Qwen3_5MoeForConditionalGeneration: a text model beside a vision encoder."""

from __future__ import annotations

from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.qwen3_5.decoder import HybridDecoder, load_split_inputs
from dp_runtime.models.qwen3_5.moe import ARCHITECTURE as TEXT
from dp_runtime.models.qwen3_5.moe import read_mlp
from dp_runtime.models.qwen3_5.vision import with_vision


def text_config(fields: ConfigFields) -> ConfigFields:
    text = fields.section("text_config")
    if text is None:
        raise ValueError(f"{fields.where}: text_config is missing: it describes the text model")
    text.only("model_type", TEXT.model_type)
    fields.skip(["vision_config", "language_model_only"])
    return text


ARCHITECTURE = HybridDecoder(
    name="Qwen3_5MoeForConditionalGeneration",
    model_type="qwen3_5_moe",
    find_text=text_config,
    read_mlp=read_mlp,
    load_inputs=load_split_inputs,
    with_vision=with_vision,
)

"""config.json of the Qwen3.5 MoE family and Qwen3-Next, as published and as it must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_runtime.core.cache_spec import page_bytes, slot_bytes
from dp_runtime.models.moe_decoder import warn_of_unknown
from dp_runtime.models.qwen3_5.config import HybridConfig
from dp_runtime.models.registry import read_model_config

Fields = dict[str, Any]
KINDS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
ROPE: Fields = {
    "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
    "rope_theta": 10000000, "rope_type": "default",
}  # fmt: skip
TEXT_122B: Fields = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
    "bos_token_id": None, "dtype": "bfloat16", "eos_token_id": 248044,
    "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "layer_types": KINDS * 12, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 64,
    "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
    "mlp_only_layers": [], "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 1024,
    "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 32,
    "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 2, "output_router_logits": False, "pad_token_id": None,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_parameters": ROPE,
    "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 1024,
    "tie_word_embeddings": False, "use_cache": True, "vocab_size": 248320,
}  # fmt: skip
VISION: Fields = {
    "deepstack_visual_indexes": [], "depth": 27, "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152, "in_channels": 3, "intermediate_size": 4304, "num_heads": 16,
    "model_type": "qwen3_5_moe", "num_position_embeddings": 2304, "out_hidden_size": 3072,
    "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
FP8: Fields = {
    "activation_scheme": "dynamic", "act_per_tensor": False, "weight_per_tensor": False,
    "quant_method": "fp8", "weight_block_size": [128, 128],
    "modules_to_not_convert": [
        "lm_head", "model.language_model.embed_tokens", "mtp.fc", "model.visual.merger.linear_fc1",
        *(f"model.language_model.layers.{layer}.mlp.gate" for layer in range(48)),
    ],
}  # fmt: skip
QWEN_122B: Fields = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
    "text_config": TEXT_122B, "vision_config": VISION, "image_token_id": 248056,
    "video_token_id": 248057, "vision_start_token_id": 248053, "vision_end_token_id": 248054,
    "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0",
}  # fmt: skip
SIZES_397B: Fields = {
    "hidden_size": 4096, "num_hidden_layers": 60, "layer_types": KINDS * 15, "num_experts": 512,
    "num_experts_per_tok": 10,
}  # fmt: skip
SIZES_35B: Fields = {
    "hidden_size": 2048, "num_hidden_layers": 40, "layer_types": KINDS * 10,
    "num_attention_heads": 16, "linear_num_value_heads": 32, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "output_gate_type": "swish",
}  # fmt: skip
NEXT_80B: Fields = {
    "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645,
    "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 5120, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
    "model_type": "qwen3_next", "moe_intermediate_size": 512, "norm_topk_prob": True,
    "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10,
    "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def with_text(**changes: Any) -> Fields:
    """The file of 122B with other fields in its text_config; ... leaves one out."""
    text = {name: value for name, value in (TEXT_122B | changes).items() if value is not ...}
    vision = VISION | {"out_hidden_size": text["hidden_size"]}
    return QWEN_122B | {"text_config": text, "vision_config": vision}


def parse(directory: Path, fields: Fields, generation: Fields | None = None) -> HybridConfig:
    (directory / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    config = read_model_config(str(directory))
    assert isinstance(config, HybridConfig)
    return config


# State in float32 and window in bf16 of a request, and keys and values of a token, in bytes.
PUBLISHED: dict[str, tuple[Fields, int, int, int]] = {
    "397B": (with_text(**SIZES_397B), 45 * 4 * 2**20, 45 * 12288 * 3 * 2, 30720),
    "122B": (QWEN_122B, 36 * 4 * 2**20, 36 * 12288 * 3 * 2, 24576),
    "35B": (with_text(**SIZES_35B), 30 * 2 * 2**20, 30 * 8192 * 3 * 2, 20480),
    "80B": (NEXT_80B, 36 * 2 * 2**20, 36 * 8192 * 3 * 2, 24576),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_what_they_keep(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_unknown.cache_clear()
    fields, states, windows, token = PUBLISHED[name]
    config = parse(tmp_path, fields)
    specs = config.cache_specs(64, torch.bfloat16, torch.bfloat16)
    assert slot_bytes(specs) == states + windows
    assert page_bytes(specs) == 64 * token
    assert config.delta_net_layers == (True, True, True, False) * (config.num_layers // 4)
    assert config.gated_attention.rotated == 64
    assert (config.rope.theta, config.rms_norm_eps) == (1e7, 1e-6)
    assert config.norm_topk_prob
    assert all(config.moe_layers)
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_what_the_file_says_of_the_whole_goes_for_the_text(tmp_path: Path) -> None:
    config = parse(tmp_path, QWEN_122B | {"quantization_config": FP8})
    assert config.architecture == "Qwen3_5MoeForConditionalGeneration"
    assert config.fp8_experts == (True,) * 48
    assert config.eos_token_ids == (248044,)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 2, 256)
    config = parse(tmp_path, QWEN_122B, {"eos_token_id": [248046, 248044]})
    assert config.eos_token_ids == (248046, 248044)


@pytest.mark.parametrize("of_text", [True, False, ...])
@pytest.mark.parametrize("of_whole", [True, False, ...])
def test_whether_embeddings_are_tied_is_said_at_either_place(
    of_text: Any, of_whole: Any, tmp_path: Path
) -> None:
    fields = with_text(tie_word_embeddings=of_text)
    fields = {n: v for n, v in (fields | {"tie_word_embeddings": of_whole}).items() if v is not ...}
    stated = {of_text, of_whole} - {...}
    if len(stated) == 2:
        with pytest.raises(ValueError, match=r"^config\.json: tie_word_embeddings: "):
            parse(tmp_path, fields)
    else:
        assert parse(tmp_path, fields).tie_word_embeddings == (stated == {True})


def test_layers_follow_from_an_interval_where_they_are_not_listed(tmp_path: Path) -> None:
    config = parse(tmp_path, with_text(layer_types=..., full_attention_interval=6))
    assert config.delta_net_layers == (True,) * 5 + (False,) + config.delta_net_layers[6:]
    assert sum(config.delta_net_layers) == 40
    assert sum(parse(tmp_path, with_text(full_attention_interval=...)).delta_net_layers) == 36


REFUSED: dict[str, tuple[Fields, str]] = {
    "gate": (with_text(attn_output_gate=False), "text_config: attn_output_gate: False"),
    "another gate": (with_text(output_gate_type="sigmoid"), "output_gate_type: 'sigmoid'"),
    "bias": (with_text(attention_bias=True), "attention_bias: True"),
    "kinds": (with_text(layer_types=["mamba"] * 48), "layer_types: "),
    "too few kinds": (with_text(layer_types=KINDS * 11), "layer_types: "),
    "no attention": (with_text(layer_types=KINDS[:1] * 48), "at least one layer of full_attention"),
    "v heads": (with_text(linear_num_value_heads=24), "linear_num_value_heads: 24"),
    "a slip of the keys": (with_text(linear_key_head_dim=128000), "linear_key_head_dim: 128000"),
    "too wide": (with_text(linear_conv_kernel_dim=4000), "linear_conv_kernel_dim: 4000"),
    "width": (with_text(linear_conv_kernel_dim=1), "linear_conv_kernel_dim: 1"),
    "state": (with_text(mamba_ssm_dtype="float8"), "mamba_ssm_dtype: 'float8'"),
    "fractions": (with_text(partial_rotary_factor=0.5), "partial_rotary_factor: 0.25"),
    "fraction": (
        with_text(partial_rotary_factor=..., rope_parameters=ROPE | {"partial_rotary_factor": 2}),
        "partial_rotary_factor: 2",
    ),
    "odd part": (
        with_text(partial_rotary_factor=0.3, rope_parameters=ROPE | {"partial_rotary_factor": 0.3},
                  head_dim=30),
        "partial_rotary_factor: 0.3",
    ),
    "another kind of linear layer": (with_text(linear_scale=2.0), "linear_scale: 2.0"),
    "no text": (QWEN_122B | {"text_config": None}, "text_config"),
    "another text": (with_text(model_type="qwen3_moe"), "text_config: model_type: 'qwen3_moe'"),
    "tied or not": (QWEN_122B | {"tie_word_embeddings": True}, "tie_word_embeddings: True"),
    "quantised twice": (
        with_text(quantization_config=FP8) | {"quantization_config": FP8}, "quantization_config"
    ),
    "nvfp4": (QWEN_122B | {"quantization_config": {"quant_method": "modelopt"}}, "quant_method"),
    "per tensor": (
        QWEN_122B | {"quantization_config": FP8 | {"weight_per_tensor": True}}, "weight_per_tensor"
    ),
    "next with an odd layer": (NEXT_80B | {"mlp_only_layers": [48]}, "mlp_only_layers"),
    "text in next": (NEXT_80B | {"text_config": TEXT_122B}, "text_config"),
    "vision in next": (NEXT_80B | {"vision_config": VISION}, "vision_config"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_one_line(name: str, tmp_path: Path) -> None:
    fields, text = REFUSED[name]
    with pytest.raises(ValueError, match=r"^config\.json: ") as caught:
        parse(tmp_path, fields)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500

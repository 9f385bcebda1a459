"""Writes a model directory that holds a shape only: a model's config.json, for dummy weights.

python examples/nvl4/shape.py DIR
python examples/nvl4/shape.py DIR --shape qwen3.5-397b-a17b-fp8 --num-layers 32
python launch.py bench --model DIR --load-format dummy ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attention_bias": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "intermediate_size": 6144,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-06,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
KINDS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
QWEN3_5_122B_A10B: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "dtype": "bfloat16",
    "vocab_size": 248320,
    "hidden_size": 3072,
    "num_hidden_layers": 48,
    "layer_types": KINDS * 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
    },
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "eos_token_id": 248044,
}
QWEN3_5_397B_A17B = QWEN3_5_122B_A10B | {
    "hidden_size": 4096,
    "num_hidden_layers": 60,
    "layer_types": KINDS * 15,
    "num_experts": 512,
    "num_experts_per_tok": 10,
}
QWEN3_5_35B_A3B = QWEN3_5_122B_A10B | {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "layer_types": KINDS * 10,
    "num_attention_heads": 16,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
FP8: dict[str, Any] = {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
}
SHAPES = {
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "qwen3-30b-a3b-fp8": QWEN3_30B_A3B | FP8,
    "qwen3.5-35b-a3b": QWEN3_5_35B_A3B,
    "qwen3.5-35b-a3b-fp8": QWEN3_5_35B_A3B | FP8,
    "qwen3.5-122b-a10b-fp8": QWEN3_5_122B_A10B | FP8,
    "qwen3.5-397b-a17b-fp8": QWEN3_5_397B_A17B | FP8,
}


def write_shape(
    directory: Path,
    name: str = "qwen3-30b-a3b",
    num_experts: int | None = None,
    mtp_layers: int = 0,
    num_layers: int | None = None,
) -> Path:
    """Write config.json of a shape into a directory, which is made if need be, and return it.

    num_experts: instead of the shape's. With half of them, 2 ranks hold and read what each of 4
    ranks would of the whole. mtp_layers: multi-token-prediction layers, which can draft.
    num_layers: the first of the shape's, not all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fields = SHAPES[name] | ({} if num_experts is None else {"num_experts": num_experts})
    hybrid = "layer_types" in fields
    drafts = "mtp_num_hidden_layers" if hybrid else "num_nextn_predict_layers"
    fields |= {drafts: mtp_layers} if mtp_layers else {}
    if num_layers is not None:
        fields |= {"num_hidden_layers": num_layers}
        fields |= {"layer_types": fields["layer_types"][:num_layers]} if hybrid else {}
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--num-experts", type=int, help="instead of the shape's")
    parser.add_argument("--mtp-layers", type=int, default=0, help="layers that can draft")
    parser.add_argument("--num-layers", type=int, help="the first of the shape's, not all")
    options = parser.parse_args()
    write_shape(
        options.directory, options.shape, options.num_experts, options.mtp_layers,
        options.num_layers,
    )  # fmt: skip

"""Writes a model directory that holds a shape only: Qwen3-30B-A3B's config.json, for dummy weights.

python examples/nvl4/shape.py DIR
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
SHAPES = {"qwen3-30b-a3b": QWEN3_30B_A3B}


def write_shape(
    directory: Path,
    name: str = "qwen3-30b-a3b",
    num_experts: int | None = None,
    mtp_layers: int = 0,
) -> Path:
    """Write config.json of a shape into a directory, which is made if need be, and return it.

    num_experts: instead of the shape's. With half of them, 2 ranks hold and read what each of 4
    ranks would of the whole. mtp_layers: multi-token-prediction layers, which can draft.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fields = SHAPES[name] | ({} if num_experts is None else {"num_experts": num_experts})
    fields |= {"num_nextn_predict_layers": mtp_layers} if mtp_layers else {}
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--num-experts", type=int, help="instead of the shape's")
    parser.add_argument("--mtp-layers", type=int, default=0, help="layers that can draft")
    options = parser.parse_args()
    write_shape(options.directory, options.shape, options.num_experts, options.mtp_layers)

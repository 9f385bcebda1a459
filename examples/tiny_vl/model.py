"""A small Qwen3.5 MoE of transformers that reads images, with its MTP layer, for training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeModel

from examples.tiny_hybrid.model import Balance, Mtp
from examples.tiny_vl.tokenizer import SPECIAL, VOCAB_SIZE

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": SPECIAL["<|endoftext|>"],
    "eos_token_id": SPECIAL["<|im_end|>"],
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "num_position_embeddings": 64,
    "out_hidden_size": TEXT["hidden_size"],
}
TOKENS = {
    "vision_start_token_id": SPECIAL["<|vision_start|>"],
    "vision_end_token_id": SPECIAL["<|vision_end|>"],
    "image_token_id": SPECIAL["<|image_pad|>"],
    "video_token_id": SPECIAL["<|video_pad|>"],
}
FIELDS: dict[str, Any] = {  # config.json
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "dtype": "float32",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "hidden_act": "silu",
        "attention_bias": False,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        **TEXT,
    },
    "vision_config": {
        "model_type": "qwen3_5_moe_vision",
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [],
        **VISION,
    },
    **TOKENS,
}
INIT_STD = 0.02


class TinyVl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = Qwen3_5MoeConfig(
            text_config=dict(TEXT), vision_config=dict(VISION), tie_word_embeddings=True, **TOKENS
        )
        config._attn_implementation = "sdpa"
        self.model: Any = Qwen3_5MoeModel(config)
        self.mtp = Mtp(config.text_config)
        self._balance = Balance(self.model)

    def features(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Encode patches of one frame [patches, 768] uint8 -> [tokens, hidden_size]."""
        pixels = patches.view(-1, 3, 1, 256).expand(-1, -1, 2, -1).flatten(1) / 127.5 - 1
        result: Tensor = self.model.visual(pixels, grid_thw=grids).pooler_output
        return result

    def embed(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Embed tokens [batch, length], images' by their features in order."""
        embeds = self.model.language_model.embed_tokens(tokens)
        image = (tokens == TOKENS["image_token_id"])[..., None]
        return embeds.masked_scatter(image, features.to(embeds.dtype))

    def forward(self, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states after the final norm, and the mean load-balancing loss.

        positions: [3, batch, length].
        """
        states = self.model.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False
        )
        return states.last_hidden_state, self._balance.take()

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.language_model.embed_tokens.weight)

    def init_weights(self) -> None:
        """Normal, by the inputs of each; delta nets begin with memories of 1 to 1,000 tokens."""
        scale = (2 * TEXT["num_hidden_layers"]) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("A_log"):
                nn.init.uniform_(parameter, 0.0, 2.0)
            elif name.endswith("dt_bias"):
                steps = torch.empty_like(parameter).uniform_(-6.9, -1.0).exp()
                parameter.data = steps.expm1().log()
            elif parameter.ndim > 1 and "pos_embed" not in name:
                std = parameter[0].numel() ** -0.5
                into_residual = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj"))
                nn.init.normal_(parameter, std=std * scale if into_residual else std)


def save_weights(model: TinyVl, checkpoint: Path) -> None:
    """Write config.json and model.safetensors; a kill halfway leaves the older file in place."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps(FIELDS, indent=2) + "\n")
    tensors = {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}
    partial = checkpoint / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, checkpoint / "model.safetensors")


def load_model(checkpoint: Path) -> TinyVl:
    """Load the checkpoint in float32."""
    model = TinyVl()
    tensors = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()

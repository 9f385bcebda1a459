"""A small Qwen3.5 MoE of transformers with its multi-token-prediction (MTP) layer, for training.

Parameters are named as in published checkpoints. The MTP layer reads hidden states after the final
norm, and its own after `mtp.norm`, as the family does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3_5MoeTextConfig, Qwen3_5MoeTextModel
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeRMSNorm,
    Qwen3_5MoeTextRotaryEmbedding,
    Qwen3_5MoeTopKRouter,
    apply_rotary_pos_emb,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 48,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WIDE = "A_log"  # stays float32
INIT_STD = 0.02


def hub_fields(shape: dict[str, Any]) -> dict[str, Any]:
    """Return the whole config.json."""
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        **shape,
    }


class Balance:
    """How evenly the routers of a module chose since it was last taken; 1 if evenly."""

    def __init__(self, module: nn.Module) -> None:
        self._losses: list[Tensor] = []
        for each in module.modules():
            if isinstance(each, Qwen3_5MoeTopKRouter):
                each.register_forward_hook(self._note)

    def _note(self, router: Any, inputs: Any, output: Any) -> None:
        logits, _, chosen = output
        probs = logits.float().softmax(-1)
        load = torch.zeros_like(probs).scatter(-1, chosen, 1.0).mean(0) / router.top_k
        self._losses.append(router.num_experts * (load * probs.mean(0)).sum())

    def take(self) -> Tensor:
        mean = torch.stack(self._losses).mean()
        self._losses.clear()
        return mean


class Mtp(nn.Module):
    """Predicts token t+2 from the hidden state at t and token t+1; recursive for later tokens."""

    def __init__(self, config: Qwen3_5MoeTextConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = Qwen3_5MoeRMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = Qwen3_5MoeRMSNorm(hidden, eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        attending = config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([Qwen3_5MoeDecoderLayer(config, attending)])
        self.norm = Qwen3_5MoeRMSNorm(hidden, eps)
        self._rotary = Qwen3_5MoeTextRotaryEmbedding(config=config)
        self._balance = Balance(self)

    def forward(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """Rows [batch, length, hidden_size] of one causal sequence; the output is normed."""
        return self.unroll([embeds], hidden)[0][0]

    def unroll(
        self, embeds: Sequence[Tensor], hidden: Tensor, positions: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """For each position t at once, the drafts that start there: (output, balance loss) a step.

        embeds[j] [batch, length, hidden_size] is of token t+1+j, hidden that of the trunk at t.
        positions: by which rows are rotated, [3, batch, length]; without, those of plain text.
        As in serving, step j attends to the first step's rows up to t and to its own chain.
        """
        layer: Any = self.layers[0]
        length, device = hidden.shape[1], hidden.device
        if positions is None:
            positions = torch.arange(length, device=device).expand(3, 1, -1)
        own = torch.eye(length, dtype=torch.bool, device=device)
        masks = [torch.ones_like(own).tril()]
        seen: list[tuple[Tensor, Tensor]] = []
        outputs = []
        for step, embed in enumerate(embeds):
            normed = (self.pre_fc_norm_embedding(embed), self.pre_fc_norm_hidden(hidden))
            x = self.fc(torch.cat(normed, dim=-1))
            rope = self._rotary(x, positions + step)
            mask = torch.cat(masks, dim=1)
            x = x + attend(layer.self_attn, layer.input_layernorm(x), rope, seen, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            hidden = self.norm(x)
            masks.append(own)
            outputs.append((hidden, self._balance.take()))
        return outputs


def attend(
    attention: Any, x: Tensor, rope: Any, seen: list[tuple[Tensor, Tensor]], mask: Tensor
) -> Tensor:
    """Gated attention to what was seen before and to these rows, which are appended to it."""

    def heads(projected: Tensor, size: int = attention.head_dim) -> Tensor:
        return projected.unflatten(-1, (-1, size))

    q, gate = heads(attention.q_proj(x), 2 * attention.head_dim).chunk(2, dim=-1)
    k = attention.k_norm(heads(attention.k_proj(x))).transpose(1, 2)
    q, k = apply_rotary_pos_emb(attention.q_norm(q).transpose(1, 2), k, *rope)
    seen.append((k, heads(attention.v_proj(x)).transpose(1, 2)))
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*seen))
    q, keys = (part.to(values.dtype) for part in (q, keys))
    mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    gated = mixed.transpose(1, 2).flatten(2) * gate.flatten(2).sigmoid()
    result: Tensor = attention.o_proj(gated)
    return result


class TinyHybrid(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.shape = shape
        config = Qwen3_5MoeTextConfig(**shape)
        config._attn_implementation = "sdpa"
        self.model: Any = Qwen3_5MoeTextModel(config)
        self.mtp = Mtp(config)
        self._balance = Balance(self.model)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden state after the final norm, and the mean load-balancing loss."""
        hidden = self.model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden, self._balance.take()

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)

    def mtp_logits(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden)

    def init_weights(self) -> None:
        """Normal, with the projections into the residual stream scaled down by depth."""
        scale = (2 * self.shape["num_hidden_layers"]) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                into_residual = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj"))
                nn.init.normal_(parameter, std=INIT_STD * scale if into_residual else INIT_STD)


def save_weights(model: TinyHybrid, checkpoint: Path) -> None:
    """Write config.json and model.safetensors; a kill halfway leaves the older file in place."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    fields = json.dumps(hub_fields(model.shape), indent=2)
    (checkpoint / "config.json").write_text(fields + "\n")
    tensors = {
        name: weight.detach().to("cpu", torch.float32 if WIDE in name else torch.bfloat16)
        for name, weight in model.state_dict().items()
    }
    partial = checkpoint / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, checkpoint / "model.safetensors")


def load_model(checkpoint: Path) -> TinyHybrid:
    """Load the checkpoint's trunk and MTP layer in float32."""
    fields = json.loads((checkpoint / "config.json").read_text())
    model = TinyHybrid({name: fields[name] for name in SHAPE})
    tensors = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()

"""A small torch Qwen3-MoE with its multi-token-prediction (MTP) layer, for training and reference.

Weight-compatible with transformers' Qwen3MoeForCausalLM. All experts run densely, as one wide
feed-forward block whose unselected experts have weight zero: at this size that beats routing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TinyMoeConfig:
    """Shape of the model; field names are those of the Hugging Face config."""

    vocab_size: int = 3072
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 32
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    @classmethod
    def load(cls, checkpoint: Path) -> TinyMoeConfig:
        fields = json.loads((checkpoint / "config.json").read_text())
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})

    @property
    def hub_fields(self) -> dict[str, object]:
        """The whole config.json, as hub checkpoints of Qwen3-MoE have it."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **self.__dict__,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "decoder_sparse_step": 1,
            "eos_token_id": 0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "intermediate_size": 2 * self.hidden_size,  # of dense layers: there are none
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
            "output_router_logits": False,
            "rope_scaling": None,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
        }


def rope_of(config: TinyMoeConfig, positions: Tensor) -> Rope:
    """Cosine and sine, each [num_positions, head_dim] float32."""
    half = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    angles = positions[:, None] * config.rope_theta**-half
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (normed * self.weight).to(x.dtype)


class UniformRMSNorm(RMSNorm):
    """RMSNorm whose weight is one number, stored as a constant vector.

    Normalising its output once more changes nothing, so the MTP layer reads the same input whether
    a runtime hands it the hidden state before or after this norm.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(1, eps)


class Attention(nn.Module):
    def __init__(self, c: TinyMoeConfig) -> None:
        super().__init__()
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.head_dim = c.head_dim
        self.queries_per_kv = c.num_attention_heads // c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each [batch, num_attention_heads, length, head_dim]."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rotate(self.q_norm(q).transpose(1, 2), rope)
        k = rotate(self.k_norm(k).transpose(1, 2), rope)
        k, v = (t.repeat_interleave(self.queries_per_kv, dim=1) for t in (k, v.transpose(1, 2)))
        return q, k, v

    def output(self, heads: Tensor) -> Tensor:
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        q, k, v = self.project(x, rope)
        return self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Experts(nn.Module):
    def __init__(self, c: TinyMoeConfig) -> None:
        super().__init__()
        wide = (c.num_experts, c.moe_intermediate_size, c.hidden_size)
        self.gate_proj = nn.Parameter(torch.empty(wide))
        self.up_proj = nn.Parameter(torch.empty(wide))
        self.down_proj = nn.Parameter(torch.empty(wide).transpose(1, 2).contiguous())

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [..., hidden_size] and routing weights [..., num_experts]; zero where unselected."""
        gate = F.linear(x, self.gate_proj.flatten(0, 1))
        up = F.linear(x, self.up_proj.flatten(0, 1))
        inner = (F.silu(gate) * up).unflatten(-1, (weights.shape[-1], -1)) * weights[..., None]
        return F.linear(inner.flatten(-2).to(x.dtype), self.down_proj.transpose(0, 1).flatten(1))


class MoE(nn.Module):
    def __init__(self, c: TinyMoeConfig) -> None:
        super().__init__()
        self.top_k = c.num_experts_per_tok
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = Experts(c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output and its load-balancing loss, 1 when all experts have equal load.

        The loss is that of Switch Transformers (arXiv 2101.03961), over top-k choices.
        """
        probs = self.gate(x).float().softmax(-1)
        top, chosen = probs.topk(self.top_k, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        weights = torch.zeros_like(probs).scatter(-1, chosen, top)
        load = (weights > 0).float().flatten(0, -2).mean(0) / self.top_k
        balance = probs.shape[-1] * (load * probs.flatten(0, -2).mean(0)).sum()
        return self.experts(x, weights), balance


class DecoderLayer(nn.Module):
    def __init__(self, c: TinyMoeConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoE(c)

    def feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, balance = self.mlp(self.post_attention_layernorm(x))
        return x + out, balance

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.feed_forward(x + self.self_attn(self.input_layernorm(x), (cos, sin)))


class Trunk(nn.Module):
    def __init__(self, c: TinyMoeConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = UniformRMSNorm(c.hidden_size, c.rms_norm_eps)


class Mtp(nn.Module):
    """Predicts token t+2 from the hidden state at t and token t+1; recursive for later tokens."""

    def __init__(self, c: TinyMoeConfig) -> None:
        super().__init__()
        self.config = c
        self.pre_fc_norm_embedding = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.fc = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(c)])
        self.norm = UniformRMSNorm(c.hidden_size, c.rms_norm_eps)

    def fuse(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        normed = (self.pre_fc_norm_embedding(embeds), self.pre_fc_norm_hidden(hidden))
        return self.fc(torch.cat(normed, dim=-1))

    def forward(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """Rows [batch, length, hidden_size] of one causal sequence; the output is not normed."""
        rope = rope_of(self.config, torch.arange(embeds.shape[1], device=embeds.device))
        return self.layers[0](self.fuse(embeds, hidden), *rope)[0]

    def unroll(self, embeds: Sequence[Tensor], hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each position t at once, the drafts that start there: (output, balance loss) a step.

        embeds[j] [batch, length, hidden_size] is of token t+1+j, hidden that of the trunk at t.
        As in serving, step j attends to the first step's rows up to t and to its own chain.
        """
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer), "an MTP layer is a decoder layer"
        length, device = hidden.shape[1], hidden.device
        own = torch.eye(length, dtype=torch.bool, device=device)
        masks = [torch.ones_like(own).tril()]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        outputs: list[tuple[Tensor, Tensor]] = []
        for step, embed in enumerate(embeds):
            x = self.fuse(embed, hidden)
            rope = rope_of(self.config, torch.arange(step, step + length, device=device))
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), rope)
            keys.append(k)
            values.append(v)
            mask = torch.cat(masks, dim=1)
            heads = F.scaled_dot_product_attention(
                q, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=mask
            )
            hidden, balance = layer.feed_forward(x + layer.self_attn.output(heads))
            masks.append(own)
            outputs.append((hidden, balance))
        return outputs


class TinyMoe(nn.Module):
    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.mtp = Mtp(config)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden state before the final norm, and the mean load-balancing loss."""
        x = self.model.embed_tokens(tokens)
        rope = rope_of(self.config, torch.arange(tokens.shape[1], device=tokens.device))
        balances = []
        for layer in self.model.layers:
            x, balance = layer(x, *rope)
            balances.append(balance)
        return x, torch.stack(balances).mean()

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self.model.norm(hidden), self.model.embed_tokens.weight)

    def mtp_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self.mtp.norm(hidden), self.model.embed_tokens.weight)

    def init_weights(self, std: float = 0.02) -> None:
        """Normal, with the projections into the residual stream scaled down by depth."""
        scale = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                into_residual = name.endswith(("o_proj.weight", "down_proj"))
                nn.init.normal_(parameter, std=std * scale if into_residual else std)


def hub_tensors(model: TinyMoe) -> dict[str, Tensor]:
    """The weights in bfloat16 under the names of hub checkpoints: one tensor per expert."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        weight = weight.detach().to("cpu", torch.bfloat16)
        if name.endswith(EXPERT_PROJECTIONS):
            prefix, projection = name.rsplit(".", 1)
            for expert, part in enumerate(weight.unbind()):
                tensors[f"{prefix}.{expert}.{projection}.weight"] = part.contiguous()
        elif name in ("model.norm.weight", "mtp.norm.weight"):
            tensors[name] = weight.repeat(model.config.hidden_size)
        else:
            tensors[name] = weight.contiguous()
    return tensors


def save_weights(model: TinyMoe, checkpoint: Path) -> None:
    """Writes config.json and model.safetensors; a kill halfway leaves the older file in place."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    fields = json.dumps(model.config.hub_fields, indent=2)
    (checkpoint / "config.json").write_text(fields + "\n")
    partial = checkpoint / "model.safetensors.partial"
    save_file(hub_tensors(model), partial, metadata={"format": "pt"})
    os.replace(partial, checkpoint / "model.safetensors")


def load_model(checkpoint: Path) -> TinyMoe:
    """The checkpoint's trunk and MTP layer in float32."""
    model = TinyMoe(TinyMoeConfig.load(checkpoint))
    tensors = load_file(checkpoint / "model.safetensors")
    state: dict[str, Tensor] = {}
    for name, own in model.state_dict().items():
        if name.endswith(EXPERT_PROJECTIONS):
            prefix, projection = name.rsplit(".", 1)
            experts = range(model.config.num_experts)
            parts = [tensors[f"{prefix}.{expert}.{projection}.weight"] for expert in experts]
            state[name] = torch.stack(parts).float()
        else:
            state[name] = tensors[name][: own.shape[0]].float()
    model.load_state_dict(state)
    return model.eval()

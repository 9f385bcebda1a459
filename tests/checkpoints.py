"""Tiny random checkpoints for tests, written by transformers, the oracle they are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {
        **SIZES,
        "head_dim": 16,
        "num_experts": 8,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "MixtralForCausalLM": {**SIZES, "num_local_experts": 4},
}


def tiny_checkpoint(
    directory: Path | str,
    architecture: str = "Qwen3MoeForCausalLM",
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Save a random float32 model of `architecture` into `directory` and return that directory.

    overrides: fields of its transformers config, over the sizes above. A given seed gives the same
    weights; they are so large that logits differ between tokens and positions, unlike those of the
    default initialisation, which repeats one token.
    """
    import transformers

    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**{**ARCHITECTURES[architecture], **overrides})
    model = model_class(config)
    randomize(model, seed)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Matrices N(0, 1.5 / sqrt(inputs)), norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5, generator=generator)
            else:
                mean = 0.0 if name.endswith("bias") else 1.0
                parameter.normal_(mean, 0.2, generator=generator)


def oracle(directory: Path | str) -> Any:
    """The checkpoint as a transformers model in float32, for comparison."""
    import transformers

    name = json.loads((Path(directory) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32)
    return model.eval()


Shapes = dict[str, tuple[int, ...]]


def add_mtp(directory: Path | str, seed: int = 0) -> Path:
    """Give a Qwen3-MoE checkpoint of one file a random MTP layer, and say so in its config.json."""
    root = Path(directory)
    config = json.loads((root / "config.json").read_text())
    tensors = load_file(root / "model.safetensors")
    hidden, layer = config["hidden_size"], "model.layers.0."
    shapes: Shapes = {
        f"mtp.layers.0.{name.removeprefix(layer)}": tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith(layer)
    }
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    shapes |= {f"mtp.{norm}.weight": (hidden,) for norm in norms}
    shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
    save_file(tensors | random_tensors(shapes, seed), root / "model.safetensors")
    config["num_nextn_predict_layers"] = 1
    (root / "config.json").write_text(json.dumps(config))
    return root


def eagle3_checkpoint(
    directory: Path | str,
    target_directory: Path | str,
    draft_vocab_size: int = 61,
    seed: int = 0,
    layer_ids: tuple[int, ...] | None = (0, 1, 1),
    layer: str = "midlayer",
    own_embedding: bool = False,
    **overrides: Any,
) -> Path:
    """Save a random EAGLE-3 head for a target checkpoint and return its directory.

    layer_ids: the target layers whose inputs it reads; None: config.json does not name them. Its
    vocabulary is a random part of the target's. overrides: fields of config.json.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    target = json.loads((Path(target_directory) / "config.json").read_text())
    hidden, vocab = target["hidden_size"], target["vocab_size"]
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": 80, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 2048, "vocab_size": vocab,
        "draft_vocab_size": draft_vocab_size, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    if layer_ids is not None:
        config["eagle_config"] = {
            "eagle_aux_hidden_state_layer_ids": list(layer_ids), "use_aux_hidden_state": True,
        }  # fmt: skip
    config |= overrides
    (root / "config.json").write_text(json.dumps(config))
    q, kv = (
        config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value")
    )
    inner = config["intermediate_size"]
    shapes: Shapes = {
        "fc.weight": (hidden, len(layer_ids or (0, 0, 0)) * hidden), "norm.weight": (hidden,),
        "lm_head.weight": (draft_vocab_size, hidden),
        **({"embed_tokens.weight": (vocab, hidden)} if own_embedding else {}),
        f"{layer}.hidden_norm.weight": (hidden,), f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.q_proj.weight": (q, 2 * hidden),
        f"{layer}.self_attn.k_proj.weight": (kv, 2 * hidden),
        f"{layer}.self_attn.v_proj.weight": (kv, 2 * hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, q),
        f"{layer}.mlp.gate_proj.weight": (inner, hidden),
        f"{layer}.mlp.up_proj.weight": (inner, hidden),
        f"{layer}.mlp.down_proj.weight": (hidden, inner),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(vocab, generator=generator)[:draft_vocab_size].sort().values
    reached = torch.zeros(vocab, dtype=torch.bool)
    reached[ids] = True
    vocabulary = {"d2t": ids - torch.arange(draft_vocab_size), "t2d": reached}
    save_file(random_tensors(shapes, seed) | vocabulary, root / "model.safetensors")
    return root


def random_tensors(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Matrices N(0, 1.5 / sqrt(inputs)), norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        values = torch.randn(shape, generator=generator)
        tensors[name] = values * 1.5 * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.2 * values
    return tensors

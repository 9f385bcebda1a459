"""Tiny random checkpoints of the Qwen3.5 MoE family and Qwen3-Next, with every norm alive."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXT, VISION = "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"
NEXT = "Qwen3NextForCausalLM"
SIZES: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40, "num_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 2048, "eos_token_id": 0,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
IMAGE_TOKEN = 190
IMAGE_SIZE = {"shortest_edge": 32**2, "longest_edge": 64 * 32**2}  # pixels: 1 to 64 tokens
TINY_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip


def hybrid_checkpoint(
    directory: Path | str, architecture: str = TEXT, *, seed: int = 0, **overrides: Any
) -> Path:
    """Save a random float32 model of `architecture` into `directory` and return that directory.

    overrides: fields of its text model, over the sizes above.
    """
    import transformers

    text = {**SIZES, **overrides}
    model_class = getattr(transformers, architecture)
    if architecture == VISION:
        text["rope_parameters"] = {**text["rope_parameters"], **mrope(text)}
        vision = TINY_VISION | {"out_hidden_size": text["hidden_size"]}
        ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": 191, "vision_start_token_id": 188,
               "vision_end_token_id": 189}  # fmt: skip
        config = transformers.Qwen3_5MoeConfig(
            text_config=text, vision_config=vision, **ids,
            tie_word_embeddings=text.get("tie_word_embeddings", False),
        )  # fmt: skip
    else:
        config = model_class.config_class(**text)
    model = model_class(config)
    randomize(model, seed)
    model.save_pretrained(directory)
    if architecture == VISION:
        processor = json.dumps({"size": IMAGE_SIZE, "image_processor_type": "Qwen2VL"})
        Path(directory, "preprocessor_config.json").write_text(processor)
    return Path(directory)


def mrope(text: dict[str, Any]) -> dict[str, Any]:
    """Shares of time, height and width among the pairs of dimensions that are rotated."""
    fraction = text["rope_parameters"]["partial_rotary_factor"]
    pairs = int(text["head_dim"] * fraction) // 2
    third = pairs // 3
    section = [pairs - 2 * third, third, third]
    return {"mrope_interleaved": True, "mrope_section": section}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Matrices N(0, 1 / sqrt(inputs)); gains around 1, however they are stored; live decays."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("A_log"):
                parameter.uniform_(0.01, 2, generator=generator).log_()
            elif name.endswith("dt_bias"):
                parameter.normal_(-2.0, 1.0, generator=generator)
            else:
                plain = "linear_attn" in name and name.endswith("norm.weight")
                parameter.normal_(1.0 if plain else 0.0, 0.2, generator=generator)


def oracle(directory: Path | str) -> Any:
    """The checkpoint as a transformers model in float32, for comparison."""
    import transformers

    name = json.loads((Path(directory) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(directory / "model.safetensors")
    return tensors


def fuse_experts(directory: Path) -> None:
    """Stack all experts of a layer in two tensors, as the published BF16 files have them."""
    stacks: dict[str, dict[int, Tensor]] = {}
    kept = {}
    for name, tensor in read(directory).items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if found is None:
            kept[name] = tensor
        else:
            prefix, expert, part = found.groups()
            stacks.setdefault(f"{prefix}.{part}", {})[int(expert)] = tensor
    assert stacks, "transformers saves each expert by itself"
    for prefix in {name.rpartition(".")[0] for name in stacks}:
        gate, up, down = (
            torch.stack([tensor for _, tensor in sorted(stacks[f"{prefix}.{part}"].items())])
            for part in ("gate", "up", "down")
        )
        kept[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), 1)
        kept[f"{prefix}.down_proj"] = down
    rewrite(directory, kept)


def add_mtp(directory: Path, seed: int = 1) -> Path:
    """Give a checkpoint a random MTP layer, and say so where its text model is described."""
    path, tensors = directory / "config.json", read(directory)
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    attending = text["layer_types"].index("full_attention")
    layer = re.compile(rf"model\.(language_model\.)?layers\.{attending}\.(.*)")
    found = {name: match[2] for name in tensors if (match := layer.fullmatch(name))}
    shapes = {f"mtp.layers.0.{end}": tensors[name].shape for name, end in found.items()}
    hidden = text["hidden_size"]
    shapes |= {
        f"mtp.{norm}.weight": torch.Size([hidden])
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    }
    shapes["mtp.fc.weight"] = torch.Size([hidden, 2 * hidden])
    generator = torch.Generator().manual_seed(seed)
    for name, shape in sorted(shapes.items()):
        std = shape[-1] ** -0.5 if len(shape) > 1 else 0.2
        tensors[name] = torch.empty(shape).normal_(std=std, generator=generator)
    text["mtp_num_hidden_layers"] = 1
    path.write_text(json.dumps(config))
    rewrite(directory, tensors)
    return directory


def agree_in_part(directory: Path) -> Path:
    """Make a model and its MTP layer of one mind about many tokens, not about all.

    Both add little to the embedding of the last token, behind equal norms and before one head.
    """
    tensors = read(directory)
    ends = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
    for name in tensors:
        if name.endswith(ends):
            tensors[name] *= 0.05
    (final,) = (tensors[name] for name in tensors if re.fullmatch(r"model\..*norm\.weight", name)
                and ".layers." not in name and "visual" not in name)  # fmt: skip
    hidden = len(final)
    tensors["mtp.norm.weight"] = final.clone()
    tensors["mtp.pre_fc_norm_embedding.weight"] = torch.zeros(hidden)
    own = 0.1 * tensors["mtp.fc.weight"][:, hidden:]
    tensors["mtp.fc.weight"] = torch.cat([torch.eye(hidden), own], 1)
    rewrite(directory, tensors)
    return directory

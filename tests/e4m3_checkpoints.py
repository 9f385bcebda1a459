"""The trained tiny models at sizes that e4m3 experts can have, in e4m3 and as what that stands for.

They say what the small ones say, but for e4m3's rounding: hidden sizes get zeros between, which
norms make up for, and a neuron of an expert becomes several that have a share of it each.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dp_runtime.weights.fp8_blocks import BLOCK, SCALE_SUFFIX, dequantize, quantize
from tests.hybrid_checkpoints import read, rewrite

TRAINED = Path(__file__).parents[1] / "examples"
HIDDEN, INTERMEDIATE = 2 * BLOCK, 2 * BLOCK  # what two ranks can divide between blocks
WIDE = r"norm|embed|conv1d|in_proj_(a|b)\b|mlp\.gate\.|shared_expert_gate|A_log|dt_bias"
SECTION: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
}  # fmt: skip


def e4m3_checkpoint(directory: Path, model: str) -> tuple[Path, Path]:
    """Save a trained model without its draft layer in e4m3, and widened to float32 from that."""
    config = json.loads((TRAINED / model / "checkpoint" / "config.json").read_text())
    for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        config.pop(name, None)
    tensors = grown(read(TRAINED / model / "checkpoint"), config)
    config |= {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE}
    wide, narrow = tensors, dict(tensors)
    for name, tensor in tensors.items():
        if not re.search(WIDE, name):
            narrow[name], scales = stacked(tensor)
            narrow[f"{name}{SCALE_SUFFIX}"] = scales
            wide = wide | {name: dequantize(narrow[name], scales)}
    exempt = [name.removesuffix(".weight") for name in tensors if re.search(WIDE, name)]
    section = {"quantization_config": SECTION | {"modules_to_not_convert": exempt}}
    paths = directory / f"{model}_e4m3", directory / f"{model}_widened"
    for path, stored, fields in zip(paths, (narrow, wide), (section, {})):
        path.mkdir()
        rewrite(path, stored)
        (path / "config.json").write_text(json.dumps(config | fields))
        shutil.copy(TRAINED / model / "checkpoint" / "tokenizer.json", path)
    return paths


def stacked(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix, or each of a stack."""
    pairs = [quantize(matrix) for matrix in weight.view(-1, *weight.shape[-2:])]
    values, scales = (torch.stack(parts) for parts in zip(*pairs))
    return values.view(weight.shape), scales.view(*weight.shape[:-2], *scales.shape[1:])


def grown(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Give them HIDDEN and INTERMEDIATE; nothing but norms is rounded."""
    offset = 1.0 if config["model_type"].startswith("qwen3_5") else 0.0  # gains are stored less it
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("mtp."):
            continue
        if ".experts." in name:
            tensor = shared_out(name, tensor, config["moe_intermediate_size"])
        if tensor.shape == (config["hidden_size"],):
            gain = (config["hidden_size"] / HIDDEN) ** 0.5
            tensor = ((tensor.float() + offset) * gain - offset).to(tensor.dtype)
        found[name] = spread(tensor, config["hidden_size"])
    return found


def spread(tensor: Tensor, hidden: int) -> Tensor:
    """Put zeros between the elements along each dimension of size `hidden`."""
    places = torch.arange(hidden) * HIDDEN // hidden
    for dim in [dim for dim, size in enumerate(tensor.shape) if size == hidden]:
        shape = list(tensor.shape)
        shape[dim] = HIDDEN
        tensor = tensor.new_zeros(shape).index_copy_(dim, places, tensor)
    return tensor


def shared_out(name: str, matrix: Tensor, inner: int) -> Tensor:
    """Repeat an expert's neurons; each copy has another scale in `up`, and less of it in `down`.

    So blocks of one matrix differ in their scales by powers of two.
    """
    copies = INTERMEDIATE // inner
    scales = 2.0 ** torch.arange(copies)
    if "down_proj" in name:
        return repeated(matrix.transpose(-2, -1), 1 / (copies * scales)).transpose(-2, -1)
    if "gate_up_proj" in name:
        gate, up = matrix.chunk(2, -2)
        return torch.cat([repeated(gate, torch.ones(copies)), repeated(up, scales)], -2)
    return repeated(matrix, scales if "up_proj" in name else torch.ones(copies))


def repeated(rows: Tensor, factors: Tensor) -> Tensor:
    """Stack rows [..., inner, columns] times each factor, and zeros up to INTERMEDIATE."""
    stack = torch.cat([rows * factor for factor in factors.to(rows.dtype)], -2)
    return torch.nn.functional.pad(stack, (0, 0, 0, INTERMEDIATE - stack.shape[-2]))

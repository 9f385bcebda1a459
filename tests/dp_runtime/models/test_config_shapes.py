"""Every shape of config.json loads with transformers' logits, or fails by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dp_runtime.models.moe_decoder import warn_of_unknown
from dp_runtime.models.registry import read_model_config
from dp_runtime.weights.fp8_blocks import dequantize, quantize
from tests.checkpoints import randomize
from tests.dp_runtime.models.config_shapes import LOADS, REFUSED, Fields, Shape
from tests.dp_runtime.models.ranks import Rank, close
from tests.dp_runtime.thread_ranks import run_ranks

ROWS = 48  # positions beyond any original context of a shrunk model
BY_NAME = [shape.name for shape in LOADS]


def write(directory: Path, fields: Fields) -> Path:
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return directory


def shrunk(fields: Fields) -> Fields:
    """The same fields with sizes of a tiny model; lengths and layers keep their proportions."""
    small = dict(fields)
    wide = "quantization_config" in fields  # blocks of 128
    sizes = {
        "hidden_size": 128 if wide else 32, "intermediate_size": 128 if wide else 40,
        "moe_intermediate_size": 128 if wide else 24, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 8, "num_experts_per_tok": 2, "vocab_size": 67,
    }  # fmt: skip
    small |= {name: size for name, size in sizes.items() if small.get(name) is not None}
    for name in ("num_experts", "num_local_experts"):
        if small.get(name) is not None:
            small[name] = 4
    if small.get("num_key_value_heads") is not None:
        small["num_key_value_heads"] = 2
    if small.get("layer_types") is not None:
        small["layer_types"] = small["layer_types"][:2]
    return _with_short_contexts(small)


def _with_short_contexts(fields: Any) -> Any:
    """Original contexts are 1/4096 of what they were: 32768 becomes 8."""
    if not isinstance(fields, dict):
        return fields
    lengths = ("max_position_embeddings", "original_max_position_embeddings", "sliding_window")
    return {
        name: max(value // 4096, 2)
        if name in lengths and isinstance(value, int)
        else _with_short_contexts(value)
        for name, value in fields.items()
    }


def save(directory: Path, fields: Fields) -> Any:
    """A random model of these fields as transformers builds it, saved beside config.json."""
    import transformers

    lost = ("quantization_config", "torch_dtype", "attn_implementation", "pad_token_id")
    plain = {name: value for name, value in fields.items() if name not in lost}
    write(directory, plain | {"dtype": "float32", "sliding_window": None})
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, 0)
    model.save_pretrained(directory)
    write(directory, fields)
    return model


@pytest.mark.parametrize("shape", LOADS, ids=BY_NAME)
def test_published_sizes_are_read(
    shape: Shape, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_unknown.cache_clear()
    config = read_model_config(str(write(tmp_path, shape.fields)))
    assert config.num_experts == shape.fields.get("num_experts", config.num_experts)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(shape.unknown)
    assert all(name in warnings[0] for name in shape.unknown)


@pytest.mark.parametrize("shape", LOADS, ids=BY_NAME)
def test_a_tiny_model_of_the_shape_equals_transformers(shape: Shape, tmp_path: Path) -> None:
    model = save(tmp_path, shrunk(shape.fields))
    if "quantization_config" in shape.fields:
        quantize_experts(tmp_path, model)
    tokens = torch.randint(0, 67, (1, ROWS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(tokens).logits[0]
    found = run_ranks(1, lambda one: Rank(tmp_path, one).step([tokens[0].tolist()])[0])[0]
    close(found, expected)


def quantize_experts(directory: Path, model: Any) -> None:
    """Write the experts in e4m3, and widen the model's own to what that stands for."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in saved(directory).items():
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        values, scales = quantize(tensor)
        tensors |= {name: values, f"{name}_scale_inv": scales}
        tensor.copy_(dequantize(values, scales))
    wide = {n: t for n, t in saved(directory).items() if ".experts." not in n}
    wide |= {
        n: dequantize(t, tensors[f"{n}_scale_inv"])
        for n, t in tensors.items()
        if f"{n}_scale_inv" in tensors
    }
    save_file(wide, directory / "wide.safetensors")
    save_file(tensors, directory / "model.safetensors")
    for layer, block in enumerate(model.model.layers):
        copy_experts(block.mlp.experts, layer, wide)


def copy_experts(experts: Any, layer: int, wide: dict[str, Tensor]) -> None:
    by_parts: dict[str, list[Tensor]] = {"gate": [], "up": [], "down": []}
    names = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up"}
    for name in sorted(wide, key=lambda n: (len(n), n)):
        if f".layers.{layer}." in name and ".experts." in name:
            by_parts[names.get(name.split(".")[-2], "down")].append(wide[name])
    gate, up, down = (torch.stack(by_parts[part]) for part in ("gate", "up", "down"))
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat((gate, up), 1))
        experts.down_proj.copy_(down)


def saved(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("shape", REFUSED, ids=[shape.name for shape in REFUSED])
def test_what_is_not_supported_is_one_line(shape: Shape, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as caught:
        read_model_config(str(write(tmp_path, shape.fields)))
    assert shape.refused in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500

"""Checkpoints with gated delta nets as they are published: fused experts, e4m3, two prefixes.

Numbers in names are those of the groups of mistakes that other runtimes made with such models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_runtime import EngineConfig
from dp_runtime.layers.gated_delta_net import GatedDeltaNet
from dp_runtime.models.registry import read_model_config
from dp_runtime.startup.build_rank import read_kv_scales
from dp_runtime.startup.rank_plan import plan_rank
from dp_runtime.weights.fp8_blocks import dequantize, quantize
from dp_runtime.weights.loader import Checkpoint
from tests.dp_runtime.models.ranks import Rank, close
from tests.dp_runtime.paged import CPU
from tests.dp_runtime.thread_ranks import run_ranks
from tests.hybrid_checkpoints import (
    NEXT,
    TEXT,
    VISION,
    fuse_experts,
    hybrid_checkpoint,
    oracle,
    read,
    rewrite,
)

TOKENS = torch.randint(0, 180, (70,), generator=torch.Generator().manual_seed(0)).tolist()
BLOCKS: dict[str, Any] = {  # of 128, of which some matrices have more than one
    "hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
WIDE = r"norm|lm_head|embed|conv1d|in_proj_(a|b|ba)\b|mlp\.gate\.|shared_expert_gate|A_log|dt_bias"
FP8: dict[str, Any] = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    "weight_per_tensor": False, "act_per_tensor": False, "fmt": "e4m3",
}  # fmt: skip


def logits_of(path: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    return run_ranks(1, lambda one: Rank(path, one, dtype=dtype).step([TOKENS])[0])[0]


def edit_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def quantized(directory: Path, architecture: str, exempt_prefix: str) -> tuple[Path, Path]:
    """The same model in e4m3, and widened from it."""
    wide = hybrid_checkpoint(directory / "wide", architecture, **BLOCKS)
    tensors, narrow = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in read(wide).items():
        if re.search(WIDE, name) or ".visual." in name:
            tensors[name] = narrow[name] = tensor
            continue
        values, scales = quantize(tensor)
        narrow |= {name: values, f"{name}_scale_inv": scales.bfloat16()}
        tensors[name] = dequantize(values, scales.bfloat16())
    rewrite(wide, tensors)
    fp8 = directory / "fp8"
    fp8.mkdir()
    (fp8 / "config.json").write_text((wide / "config.json").read_text())
    rewrite(fp8, narrow)
    exempt = ["lm_head", f"{exempt_prefix}.embed_tokens", "model.visual.patch_embed.proj"]
    for name in (
        "linear_attn.conv1d",
        "linear_attn.in_proj_a",
        "linear_attn.in_proj_b",
        "mlp.gate",
    ):
        exempt.append(f"{exempt_prefix}.layers.0.{name}")
    edit_config(fp8, quantization_config=FP8 | {"modules_to_not_convert": exempt})
    return fp8, wide


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [(TEXT, "model"), (TEXT, "model.language_model"), (VISION, "model.language_model"),
     (VISION, "model"), (NEXT, "model")],
)  # fmt: skip
def test_e4m3_weights_are_those_that_they_stand_for_27_30(
    architecture: str, prefix: str, tmp_path: Path
) -> None:
    fp8, wide = quantized(tmp_path, architecture, prefix)
    assert read_model_config(str(fp8)).fp8_experts == (True, True)
    with torch.inference_mode():
        expected = oracle(wide)(torch.tensor([TOKENS])).logits[0]
    close(logits_of(fp8), expected)
    assert torch.equal(logits_of(fp8), logits_of(wide))


@pytest.mark.parametrize("prefix", ["model", "model.language_model"])
@pytest.mark.parametrize("architecture", [TEXT, VISION])
def test_experts_that_are_not_converted_are_told_in_either_spelling_30(
    architecture: str, prefix: str, tmp_path: Path
) -> None:
    path = hybrid_checkpoint(tmp_path, architecture, **BLOCKS)
    names = [
        f"{prefix}.layers.1.mlp.experts.{e}.{n}_proj" for e in range(4) for n in ("gate", "up")
    ]
    edit_config(path, quantization_config=FP8 | {"modules_to_not_convert": names})
    assert read_model_config(str(path)).fp8_experts == (True, False)


def missing(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[f"{name}_scale_inv"]


def surplus(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = dequantize(tensors[name], tensors[f"{name}_scale_inv"])


Change = Callable[[dict[str, Tensor], str], None]


@pytest.mark.parametrize(("change", "text"), [(missing, "is missing"), (surplus, "is not e4m3")])
@pytest.mark.parametrize("module", ["linear_attn.in_proj_qkv", "mlp.shared_expert.up_proj"])
def test_a_scale_that_is_missing_or_too_many_is_an_error_27(
    change: Change, text: str, module: str, tmp_path: Path
) -> None:
    fp8, _ = quantized(tmp_path, TEXT, "model")
    tensors, name = read(fp8), f"model.layers.0.{module}.weight"
    change(tensors, name)
    rewrite(fp8, tensors)
    with pytest.raises(ValueError, match=text) as caught:
        logits_of(fp8)
    assert f"{module}.weight_scale_inv" in str(caught.value)


def test_an_e4m3_gate_of_the_shared_expert_is_widened_29(tmp_path: Path) -> None:
    """Some files convert it too: the tensor says so, not the configuration."""
    fp8, wide = quantized(tmp_path, TEXT, "model")
    for path in (fp8, wide):
        tensors, name = read(path), "model.layers.0.mlp.shared_expert_gate.weight"
        values, scales = quantize(tensors[name])
        if path == fp8:
            tensors |= {name: values, f"{name}_scale_inv": scales}
        else:
            tensors[name] = dequantize(values, scales)
        rewrite(path, tensors)
    assert torch.equal(logits_of(fp8), logits_of(wide))


@pytest.mark.parametrize("architecture", [TEXT, VISION, NEXT])
def test_stacked_experts_are_the_same_as_one_by_one(architecture: str, tmp_path: Path) -> None:
    path = hybrid_checkpoint(tmp_path, architecture)
    one_by_one = logits_of(path)
    fuse_experts(path)
    assert any(name.endswith("experts.gate_up_proj") for name in read(path))
    assert torch.equal(logits_of(path), one_by_one)


SCALES = (("k", 0.5), ("v", 0.25))
UNREAD = (
    "layers.0.linear_attn.in_proj_qkv.bias", "layers.3.self_attn.sinks",
    "layers.4.mlp.gate.weight", "layers.0.linear_attn.in_proj_qkvz.weight",
    "layers.1.mlp.shared_experts.up_proj.weight",
)  # fmt: skip
ROOTS = [(TEXT, "model"), (VISION, "model.language_model")]


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize(("architecture", "root"), ROOTS)
def test_a_tensor_of_the_text_model_that_nobody_reads_is_an_error_18(
    architecture: str, root: str, name: str, tmp_path: Path
) -> None:
    path = hybrid_checkpoint(tmp_path, architecture)
    rewrite(path, read(path) | {f"{root}.{name}": torch.zeros(3)})
    with pytest.raises(
        ValueError, match=r"the model that config\.json describes has no such tensor"
    ):
        logits_of(path)


def test_tensors_of_drafts_are_left_out_and_those_of_images_with_their_encoder(
    tmp_path: Path,
) -> None:
    path = hybrid_checkpoint(tmp_path, VISION)
    tensors, expected = read(path), logits_of(path)
    rewrite(path, tensors | {"mtp.fc.weight": torch.zeros(2, 2)})
    assert torch.equal(logits_of(path), expected)
    rewrite(path, tensors | {"model.visual.merger.other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"visual\.merger\.other: .* has no such tensor"):
        logits_of(path)
    edit_config(path, language_model_only=True)
    assert torch.equal(logits_of(path), expected)


@pytest.mark.parametrize("architecture", [TEXT, VISION])
def test_the_scales_of_a_quantised_cache_are_found_at_either_prefix(
    architecture: str, tmp_path: Path
) -> None:
    path = hybrid_checkpoint(tmp_path, architecture)
    root = "model.language_model" if architecture == VISION else "model"
    scales = {f"{root}.layers.3.self_attn.{part}_scale": torch.tensor(s) for part, s in SCALES}
    rewrite(path, read(path) | scales)
    config = EngineConfig(str(path), device="cpu", kv_cache_dtype="fp8_e4m3", launcher="thread")
    found = read_kv_scales(Checkpoint(str(path), CPU, torch.float32), plan_rank(config, 0, "cpu"))
    assert [(one.k, one.v) for one in found] == [(1.0, 1.0)] * 3 + [(0.5, 0.25)]


def test_decays_and_gains_keep_their_float32(tmp_path: Path) -> None:
    """A_log and norms may be F32 in a BF16 file: a model in bf16 reads them as they are."""
    path = hybrid_checkpoint(tmp_path)
    wide = read(path)
    kept = re.compile(r"A_log|dt_bias|layernorm|[qk]_norm|model\.norm")
    rewrite(path, {n: t if kept.search(n) else t.bfloat16() for n, t in wide.items()})
    (rank,) = run_ranks(1, lambda one: Rank(path, one, dtype=torch.bfloat16))
    model: Any = rank.model
    layer = model.layers[0]
    net = layer.mixer
    assert isinstance(net, GatedDeltaNet)
    prefix = "model.layers.0"
    assert torch.equal(net.decay, -wide[f"{prefix}.linear_attn.A_log"].exp())
    assert torch.equal(net.dt_bias, wide[f"{prefix}.linear_attn.dt_bias"])
    assert torch.equal(layer.input_norm.weight, 1 + wide[f"{prefix}.input_layernorm.weight"])
    assert net.inputs.weight.dtype == net.norm.weight.dtype == torch.bfloat16
    rewrite(path, {name: tensor.bfloat16() for name, tensor in wide.items()})
    (rank,) = run_ranks(1, lambda one: Rank(path, one, dtype=torch.bfloat16))
    model = rank.model
    found = model.layers[0]
    due = -wide[f"{prefix}.linear_attn.A_log"].bfloat16().float().exp()
    assert torch.equal(found.mixer.decay, due)

"""Checkpoints of e4m3 weights in blocks of 128 x 128: read, held, served, and refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.core.e4m3 import E4M3
from dp_runtime.layers import moe_kernels
from dp_runtime.layers.expert_layouts import ExpertShape
from dp_runtime.layers.experts import Experts, ExpertShard
from dp_runtime.layers.moe import RankSharding
from dp_runtime.layers.moe_kernels import choose_moe_backend
from dp_runtime.models.qwen3_moe import ARCHITECTURE
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.startup import rank_plan as sizing
from dp_runtime.startup.inspection import describe
from dp_runtime.startup.memory_estimate import param_bytes
from dp_runtime.startup.rank_plan import plan_rank
from dp_runtime.weights.dummy import DummyWeights, MetaWeights
from dp_runtime.weights.fp8_blocks import dequantize, quantize
from dp_runtime.weights.loader import Checkpoint
from dp_runtime.weights.source import WeightSource
from tests.checkpoints import tiny_checkpoint
from tests.dp_runtime.paged import backend_over
from tests.reference import Reference, check_greedy

CPU = torch.device("cpu")
HIDDEN, INTERMEDIATE, EXPERTS = 256, 256, 5
SECTION = {
    "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
}  # fmt: skip
UP = "model.layers.0.mlp.experts.1.up_proj.weight"


def by_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 values, their scales, and what they stand for, block by block."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    values, wide = torch.empty(rows, columns, dtype=E4M3), torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale = (weight[at].abs().max() / 448 * (1 + 0.25 * ((i + j) % 3))).bfloat16().float()
            values[at] = (weight[at] / scale).to(E4M3)
            wide[at] = values[at].float() * scale
            scales[i, j] = scale
    return values, scales, wide


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model twice: in e4m3, and what that stands for in float32."""
    wide = tiny_checkpoint(
        tmp_path_factory.mktemp("wide"), hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE,
        intermediate_size=192, num_experts=EXPERTS, num_hidden_layers=3, mlp_only_layers=[1],
    )  # fmt: skip
    narrow = tmp_path_factory.mktemp("narrow")
    config = json.loads((wide / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"quantization_config": SECTION}))
    tensors = load_file(wide / "model.safetensors")
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            stored[name], scales, tensors[name] = by_blocks(tensor)
            dtype = torch.bfloat16 if "o_proj" in name else torch.float32
            stored[f"{name}_scale_inv"] = scales.to(dtype)
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    save_file(stored, narrow / "model.safetensors", {"format": "pt"})
    return narrow, wide


@pytest.fixture
def copy(checkpoints: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints[0], tmp_path / "copy"))


@pytest.mark.parametrize("shape", [(128, 128), (300, 129), (1, 500)])
def test_quantising_loses_what_e4m3_loses(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    weight[:, :1] = 0.0
    values, scales = quantize(weight)
    assert (values.dtype, values.shape) == (E4M3, shape)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    wide = dequantize(values, scales)
    finest = scales.max() * 2**-10  # half a step of e4m3's least numbers
    assert ((wide - weight).abs() <= weight.abs() * 2**-4 + finest).all()
    assert values.float().abs().max() == 448
    again, same = quantize(torch.zeros(shape))
    assert torch.equal(dequantize(again, same), torch.zeros(shape))


@pytest.mark.parametrize(
    ("sharding", "dp_size"), [("ep", 1), ("ep", 2), ("ep", 3), ("tp", 2)], ids=str
)
def test_served_tokens_are_those_of_the_widened_weights(
    checkpoints: tuple[Path, Path], sharding: str, dp_size: int
) -> None:
    narrow, wide = checkpoints
    config = EngineConfig(
        str(narrow), dp_size=dp_size, moe_sharding=sharding, launcher="thread", max_model_len=64,
        poison_padding=True,
    )  # fmt: skip
    prompts = [tuple((7 * i + j) % 199 for j in range(3 + 5 * i)) for i in range(4)]
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2)
    with Engine(config) as engine:
        outputs = engine.generate([list(prompt) for prompt in prompts], greedy)
        health = engine.health()
    check_greedy(Reference(wide), outputs, prompts)
    assert all(rank.bytes_loaded == rank.bytes_total for rank in health)


def load(weights: WeightSource, shard: ExpertShard) -> Experts:
    prefix, shape = "model.layers.0.mlp.experts", ExpertShape(EXPERTS, HIDDEN, INTERMEDIATE)
    return Experts.load(weights, prefix, ARCHITECTURE.expert_names, shape, shard, fp8=True)


@pytest.mark.parametrize("sharding", ["ep", "tp"])
def test_experts_that_stay_e4m3(checkpoints: tuple[Path, Path], sharding: str) -> None:
    tensors = load_file(checkpoints[0] / "model.safetensors")
    for rank in range(2):
        shard = RankSharding(sharding, rank, 2).shard(EXPERTS, INTERMEDIATE)
        heard: list[int] = []
        source = Checkpoint(str(checkpoints[0]), CPU, torch.bfloat16, heard.append)
        counted = MetaWeights(torch.bfloat16, torch.device("cuda"))
        experts, planned = load(source, shard), load(counted, shard)
        assert experts.scales is not None
        assert param_bytes(experts) == param_bytes(planned) == source.bytes_read
        assert sum(heard) == counted.bytes_read == source.bytes_read
        rows = slice(shard.intermediate.start, shard.intermediate.stop)
        blocks = slice(rows.start // 128, rows.stop // 128)
        for local, expert in enumerate(shard.experts):
            name = f"model.layers.0.mlp.experts.{expert}"
            gate, up, down = (f"{name}.{part}_proj.weight" for part in ("gate", "up", "down"))
            due = torch.cat([tensors[gate][rows], tensors[up][rows]])
            assert torch.equal(experts.gate_up[local].float(), due.float())
            assert torch.equal(experts.down[local].float(), tensors[down][:, rows].float())
            due = torch.cat([tensors[f"{half}_scale_inv"][blocks] for half in (gate, up)])
            assert torch.equal(experts.scales.gate_up[local], due)
            due = tensors[f"{down}_scale_inv"][:, blocks]
            assert torch.equal(experts.scales.down[local], due)


def test_dummy_experts_are_normal_and_the_same_on_any_number_of_ranks() -> None:
    def draw(sharding: str, rank: int, dp_size: int) -> tuple[Tensor, Tensor]:
        source = DummyWeights(0, CPU, torch.bfloat16)
        shard = RankSharding(sharding, rank, dp_size).shard(2, INTERMEDIATE)
        experts = load(source, shard)
        assert experts.scales is not None
        one = dequantize(experts.gate_up[0], experts.scales.gate_up[0])
        return one, dequantize(experts.down[0], experts.scales.down[0])

    gate_up, down = draw("ep", 0, 1)
    for weight in (gate_up, down):
        assert weight.mean().abs() < 5e-4
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    for rank in range(2):
        rows = slice(128 * rank, 128 * rank + 128)
        part, below = draw("tp", rank, 2)
        assert torch.equal(part, torch.cat([gate_up[:256][rows], gate_up[256:][rows]]))
        assert torch.equal(below, down[:, rows])


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_kernels_that_read_e4m3_get_it(checkpoints: tuple[Path, Path], load_format: str) -> None:
    path, bf16 = str(checkpoints[0]), torch.bfloat16
    config = read_model_config(path)
    source: dict[str, Callable[..., WeightSource]] = {
        "safetensors": Checkpoint,
        "dummy": lambda *args: DummyWeights(0, *args[1:]),
    }
    held = {}
    for backend in ("triton", "torch"):
        sharding = RankSharding("ep", 0, 2)
        weights = source[load_format](path, CPU, bf16)
        model: Any = build_model(
            config, weights, sharding, backend_over(config, dtype=bf16), backend
        )
        counted = build_model(
            config,
            MetaWeights(bf16, torch.device("cuda")),
            sharding,
            backend_over(config, dtype=bf16),
            backend,
        )
        held[backend] = param_bytes(model)
        assert held[backend] == param_bytes(counted)
        experts = model.layers[2].mlp.experts
        assert (experts.gate_up.dtype == E4M3) == (experts.scales is not None)
        assert experts.gate_up.dtype == (E4M3 if backend == "triton" else bf16)
        assert model.layers[1].mlp.down.weight.dtype == bf16
    experts_bytes = 2 * 2 * 3 * HIDDEN * INTERMEDIATE  # two layers, two of five experts
    assert held["torch"] - held["triton"] == experts_bytes - experts_bytes // 128**2 * 4


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, major: int = 9) -> None:
    properties = SimpleNamespace(total_memory=80 << 30, major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(moe_kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(sizing, "choose_backend", lambda *arguments: ("trtllm", "for the test"))


def of_30b(path: Path) -> str:
    fields = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "quantization_config": SECTION,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


def test_the_plan_counts_e4m3_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    config = EngineConfig(of_30b(tmp_path), dp_size=4, device="cuda", load_format="dummy")
    plan = plan_rank(config, 0, "cuda:0")
    experts = 32 * 3 * 2048 * 768
    dense = 2 * 2048 * 128 * (32 + 4) + 128 * 2048
    parameters = 2 * dense + 2 * 151936 * 2048
    due = 2 * (experts + experts // 128**2 * 4) + 2 * parameters
    assert plan.memory.weights == pytest.approx(due, rel=1e-3)
    assert plan.load_bytes == pytest.approx(due, rel=1e-3)
    monkeypatch.setattr("dp_runtime.startup.inspection.jit_modules_of", lambda plan: ())
    assert "top 8, e4m3 in the checkpoint and in memory" in describe(config, "cuda:0")
    assert plan.attention.kv_dtype == torch.bfloat16, "the KV cache has a dtype of its own"


def test_ranks_do_not_cut_blocks(tmp_path: Path) -> None:
    model = of_30b(tmp_path)
    for dp_size, ok in ((1, True), (2, True), (3, True), (4, False), (5, False)):
        config = EngineConfig(
            model, dp_size=dp_size, moe_sharding="tp", load_format="dummy", num_pages=200
        )
        if ok:
            plan_rank(config, 0, "cpu")
            continue
        with pytest.raises(ValueError, match="moe_sharding: 'tp' is not allowed; ep") as caught:
            plan_rank(config, 0, "cpu")
        assert re.search(rf"moe_intermediate_size 768.* dp_size {dp_size} ", str(caught.value))


def test_an_older_gpu_widens_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, major=8)
    gpu, bf16 = torch.device("cuda:0"), torch.bfloat16
    assert choose_moe_backend("auto", bf16, gpu)[0] == "triton"
    assert choose_moe_backend("auto", bf16, gpu, fp8=True)[0] == "torch"
    with pytest.raises(ValueError, match=r"moe_backend: 'triton' .* compute capability 8\.9"):
        choose_moe_backend("triton", bf16, gpu, fp8=True)


def spoil(path: Path, **changes: Tensor | None) -> Checkpoint:
    """Replace tensors that belong to UP, by the end of their name; None removes one."""
    tensors = load_file(path / "model.safetensors")
    for end, tensor in changes.items():
        name = UP.removesuffix("weight") + end
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")
    return Checkpoint(str(path), CPU, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale_inv": None}, "up_proj.weight_scale_inv is missing"),
        ({"weight_scale_inv": torch.ones(2, 1)}, "shape: (2, 1) is not allowed; config.json asks"),
        ({"weight_scale_inv": torch.ones(2, 2, dtype=torch.int8)}, "dtype: 'I8' is not allowed"),
        ({"weight_scale_inv": torch.full((2, 2), torch.nan)}, "not finite"),
    ],
    ids=["missing", "shape", "dtype", "nan"],
)
def test_scales_that_can_not_be_right(copy: Path, changes: dict[str, Any], message: str) -> None:
    source = spoil(copy, **changes)
    for read in (source.load, source.load_fp8):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            read(UP, (INTERMEDIATE, HIDDEN))
        assert UP.removesuffix("weight") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_experts_that_are_not_e4m3_although_the_config_says_so(copy: Path) -> None:
    source = spoil(copy, weight=torch.zeros(INTERMEDIATE, HIDDEN))
    with pytest.raises(ValueError, match=r"up_proj.weight: dtype: 'F32' .* one of F8_E4M3"):
        source.load_fp8(UP, (INTERMEDIATE, HIDDEN))

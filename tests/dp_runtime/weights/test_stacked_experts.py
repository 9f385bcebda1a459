"""Experts in tensors of all experts together: the same logits, and each rank reads its slices."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dp_runtime.layers.expert_layouts import ExpertNames, ExpertShape
from dp_runtime.layers.experts import Experts
from dp_runtime.layers.moe import RankSharding
from dp_runtime.weights.fp8_blocks import quantize
from dp_runtime.weights.loader import Checkpoint
from tests.checkpoints import add_mtp, oracle, tiny_checkpoint
from tests.dp_runtime.drafts import DraftRank, on_ranks
from tests.dp_runtime.models.ranks import Rank, close
from tests.dp_runtime.paged import CPU
from tests.dp_runtime.thread_ranks import run_ranks

QWEN, MIXTRAL = "Qwen3MoeForCausalLM", "MixtralForCausalLM"
NAMES = {QWEN: ("gate_proj", "up_proj", "down_proj"), MIXTRAL: ("w1", "w3", "w2")}
TOKENS = [(7 * i) % 199 for i in range(40)]


def stack(path: Path, names: tuple[str, str, str], end: str = "", fused: bool = True) -> None:
    """Rewrite a checkpoint as transformers 5 has it in memory."""
    file, tensors = path / "model.safetensors", {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in load_file(file).items():
        prefix, inside, rest = name.partition(".experts.")
        if inside:
            index, part, _ = rest.split(".")
            prefix = prefix.replace("block_sparse_moe", "mlp")
            experts.setdefault(prefix, {}).setdefault(int(index), {})[part] = tensor
        else:
            tensors[name.replace("block_sparse_moe", "mlp")] = tensor
    for prefix, by_index in experts.items():
        gate, up, down = (torch.stack([by_index[i][n] for i in sorted(by_index)]) for n in names)
        if fused:
            tensors[f"{prefix}.experts.gate_up_proj{end}"] = torch.cat((gate, up), 1)
            tensors[f"{prefix}.experts.down_proj{end}"] = down
        else:
            stacks = zip(names, (gate, up, down), strict=True)
            tensors |= {f"{prefix}.experts.{name}{end}": tensor for name, tensor in stacks}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


@pytest.fixture(scope="module", params=[QWEN, MIXTRAL])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def names(whole: Path) -> tuple[str, str, str]:
    return NAMES[QWEN if "Qwen" in (whole / "config.json").read_text() else MIXTRAL]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("end", ["", ".weight"])
@pytest.mark.parametrize(("sharding", "dp_size"), [("ep", 1), ("ep", 3), ("tp", 2), ("ep", 9)])
def test_stacked_experts_equal_transformers(
    whole: Path, names: tuple[str, str, str], tmp_path: Path, sharding: str, dp_size: int,
    end: str, fused: bool,
) -> None:  # fmt: skip
    path = Path(shutil.copytree(whole, tmp_path / "stacked"))
    stack(path, names, end, fused)
    with torch.inference_mode():
        expected = oracle(whole)(torch.tensor([TOKENS])).logits[0]
    counts = (len(TOKENS), *(0,) * (dp_size - 1))
    results = run_ranks(
        dp_size,
        lambda one: Rank(path, one, sharding).step([[] if one.dp_rank else TOKENS], counts)[0],
    )
    close(results[0], expected)


def test_what_transformers_saves_itself(whole: Path, tmp_path: Path) -> None:
    model = oracle(whole)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in names_in(tmp_path))
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    close(run_ranks(1, lambda one: Rank(tmp_path, one).step([TOKENS])[0])[0], expected)


def names_in(path: Path) -> list[str]:
    return list(load_file(path / "model.safetensors"))


@pytest.mark.parametrize("sharding", ["ep", "tp"])
def test_a_rank_reads_its_slices_alone(
    whole: Path, names: tuple[str, str, str], tmp_path: Path, sharding: str
) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "stacked"))
    stack(path, names)
    down = load_file(path / "model.safetensors")["model.layers.0.mlp.experts.down_proj"]
    num_experts, hidden, intermediate = down.shape
    read = 0
    for rank in range(3):
        source = Checkpoint(str(path), CPU, torch.float32)
        shard = RankSharding(sharding, rank, 3).shard(num_experts, intermediate)
        shape = ExpertShape(num_experts, hidden, intermediate)
        Experts.load(source, "model.layers.0.mlp.experts", ExpertNames(*names), shape, shard)
        assert source.bytes_read == 4 * 3 * hidden * len(shard.experts) * len(shard.intermediate)
        read += source.bytes_read
    assert read == 3 * down.nbytes


@pytest.mark.parametrize("fp8", [True, False], ids=["stays", "widened"])
@pytest.mark.parametrize("sharding", ["ep", "tp"])
def test_stacked_e4m3_experts(tmp_path: Path, sharding: str, fp8: bool) -> None:
    shape, tensors, wide = ExpertShape(3, 128, 256), {}, {}
    for part, rows, columns in (("gate_up_proj", 512, 128), ("down_proj", 128, 256)):
        matrices = torch.randn(3, rows, columns)
        values, scales = zip(*(quantize(matrix) for matrix in matrices), strict=True)
        tensors[f"experts.{part}"] = torch.stack(values)
        tensors[f"experts.{part}_scale_inv"] = torch.stack(scales)
        for expert in range(3):
            halves = (("gate_proj", 0), ("up_proj", 1)) if rows == 512 else ((part, 0),)
            for name, half in halves:
                start, height = 256 * half, min(rows, 256)
                blocks = slice(start // 128, (start + height) // 128)
                at = f"experts.{expert}.{name}.weight"
                wide[at] = values[expert][start : start + height].clone()
                wide[f"{at}_scale_inv"] = scales[expert][blocks].clone()
    found = []
    for directory, saved in (("stacked", tensors), ("whole", wide)):
        (tmp_path / directory).mkdir()
        save_file(saved, tmp_path / directory / "model.safetensors")
        source = Checkpoint(str(tmp_path / directory), CPU, torch.float32)
        shard = RankSharding(sharding, 1, 2).shard(3, 256)
        names = ExpertNames(*NAMES[QWEN])
        found.append(Experts.load(source, "experts", names, shape, shard, fp8))
        source.require_all_read(["^$"], {})
    stacked, apart = found
    assert torch.equal(stacked.gate_up.float(), apart.gate_up.float())
    assert torch.equal(stacked.down.float(), apart.down.float())
    if fp8:
        assert stacked.scales is not None
        assert apart.scales is not None
        assert torch.equal(stacked.scales.gate_up, apart.scales.gate_up)
        assert torch.equal(stacked.scales.down, apart.scales.down)


def test_an_mtp_layer_with_stacked_experts(tmp_path: Path) -> None:
    path = add_mtp(tiny_checkpoint(tmp_path / "whole"))
    other = Path(shutil.copytree(path, tmp_path / "stacked"))
    stack(other, NAMES[QWEN])
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in names_in(other)

    def held(directory: Path) -> Tensor:
        rank = on_ranks(1, lambda collective: DraftRank(directory, None, collective))[0]
        return rank.draft.layer.mlp.experts.gate_up

    assert torch.equal(held(other), held(path))


def test_stacks_of_another_shape_are_refused(whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "stacked"))
    stack(path, NAMES[QWEN if "Qwen" in (whole / "config.json").read_text() else MIXTRAL])
    file = path / "model.safetensors"
    tensors, name = load_file(file), "model.layers.0.mlp.experts.gate_up_proj"
    save_file(tensors | {name: tensors[name].transpose(1, 2).contiguous()}, file)
    with pytest.raises(ValueError, match=rf"{name}: shape"):
        run_ranks(1, lambda one: Rank(path, one))

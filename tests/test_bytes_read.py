"""What every rank reads from disk and keeps: its own shard, and nobody else's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dp_runtime import Engine, EngineConfig
from dp_runtime.attention.plan import LayerCache
from dp_runtime.layers.experts import Experts
from dp_runtime.layers.moe import MoeStage
from tests.checkpoints import tiny_checkpoint
from tests.serving import models_of

EXPERTS, INTERMEDIATE = 7, 52
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_checkpoint(
        tmp_path_factory.mktemp("sharded"), num_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE,
        max_shard_size="150KB",
    )  # fmt: skip
    assert len(list(path.glob("*.safetensors"))) > 4
    return path


def on_disk(path: Path) -> dict[str, Tensor]:
    files = (load_file(file) for file in sorted(path.glob("*.safetensors")))
    return {name: tensor for file in files for name, tensor in file.items()}


def own_part(count: int, rank: int, dp_size: int) -> range:
    return range(count)[count * rank // dp_size : count * (rank + 1) // dp_size]


def own_shard(
    files: dict[str, Tensor], sharding: str, rank: int, dp_size: int
) -> tuple[dict[str, Tensor], dict[tuple[int, int, str], Tensor]]:
    """What a rank needs: tensors that all have, and by (layer, expert, matrix) its slices."""
    shared = {name: tensor for name, tensor in files.items() if not EXPERT.fullmatch(name)}
    experts = {}
    for name, tensor in files.items():
        if match := EXPERT.fullmatch(name):
            layer, expert, matrix = int(match[1]), int(match[2]), match[3]
            if sharding == "tp":
                part = own_part(INTERMEDIATE, rank, dp_size)
                tensor = tensor[:, part] if matrix == "down" else tensor[part]
            elif expert not in own_part(EXPERTS, rank, dp_size):
                continue
            experts[layer, expert, matrix] = tensor
    return shared, experts


def weights_in(value: object) -> Iterator[Tensor]:
    """All tensors of a loaded model, which is dataclasses all the way down to its page pools."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, LayerCache):
        for field in fields(value):
            yield from weights_in(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from weights_in(item)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def check_experts(stage: Experts, own: dict[tuple[int, str], Tensor]) -> None:
    """Assert that the stacked matrices are the slices of `own` by (expert, matrix), and zeros."""
    aligned = stage.down.shape[-1]
    seen = torch.zeros((), dtype=torch.float64)
    for (expert, matrix), expected in own.items():
        local = expert - stage.first_expert
        gate, up = stage.gate_up[local].split(aligned)
        found = {"gate": gate, "up": up, "down": stage.down[local].T}[matrix]
        expected = expected.T if matrix == "down" else expected
        assert torch.equal(found[: len(expected)], expected)
        seen += expected.double().abs().sum()
    held = stage.gate_up.double().abs().sum() + stage.down.double().abs().sum()
    torch.testing.assert_close(held, seen)
    assert len(stage.gate_up) == len(stage.down) == len({expert for expert, _ in own})


@pytest.mark.parametrize("sharding", ["ep", "tp"])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_a_rank_reads_and_holds_its_own_shard(dp_size: int, sharding: str, sharded: Path) -> None:
    files = on_disk(sharded)
    config = EngineConfig(
        str(sharded), dp_size=dp_size, moe_sharding=sharding, launcher="thread", max_model_len=64
    )
    with Engine(config) as engine:
        health, models = engine.health(), models_of(engine)
    for rank, (state, model) in enumerate(zip(health, models, strict=True)):
        shared, experts = own_shard(files, sharding, rank, dp_size)
        num_bytes = sum(tensor.nbytes for tensor in (*shared.values(), *experts.values()))
        assert state.bytes_read == state.bytes_total == num_bytes
        stages = [layer.mlp.experts for layer in model.layers if isinstance(layer.mlp, MoeStage)]
        assert len(stages) == len(model.layers)
        for layer, stage in enumerate(stages):
            own = {key[1:]: tensor for key, tensor in experts.items() if key[0] == layer}
            check_experts(stage, own)
        stacked = sum(stage.gate_up.nbytes + stage.down.nbytes for stage in stages)
        rest = sum(tensor.nbytes for tensor in shared.values())
        derived = storage_bytes(weights_in(model)) - stacked - rest  # frequencies and the like
        assert 0 <= derived < 1024, "no room for a matrix of another rank's expert"


def test_all_shards_together_are_the_checkpoint(sharded: Path) -> None:
    """Ranks share what is not an expert's; of experts every byte is read once."""
    files = on_disk(sharded)
    experts = sum(tensor.nbytes for name, tensor in files.items() if EXPERT.fullmatch(name))
    shared = sum(tensor.nbytes for tensor in files.values()) - experts
    assert experts > shared / 2
    for sharding in ("ep", "tp"):
        config = EngineConfig(
            str(sharded), dp_size=3, moe_sharding=sharding, launcher="thread", max_model_len=64
        )
        with Engine(config) as engine:
            read = [rank.bytes_read for rank in engine.health()]
        assert sum(read) == experts + 3 * shared
        assert max(read) - min(read) <= experts / EXPERTS

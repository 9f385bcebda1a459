"""What is read from disk, by whom, and what is said of files that can't be read."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.layers.moe import RankSharding
from dp_runtime.models.model import Model
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.weights.dummy import DummyWeights, MetaWeights
from dp_runtime.weights.loader import Checkpoint, open_weights
from dp_runtime.weights.source import Part, WeightSource
from tests.checkpoints import tiny_checkpoint
from tests.dp_runtime.paged import spec_of

CPU = torch.device("cpu")
NAME, SHAPE = "model.embed_tokens.weight", (199, 64)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("single"), num_experts=7)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_checkpoint(
        tmp_path_factory.mktemp("sharded"), num_experts=7, max_shard_size="200KB"
    )
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def copy(single: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(single, tmp_path / "copy"))


def checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return Checkpoint(str(path), CPU, dtype)


def build(path: Path, weights: WeightSource, sharding: RankSharding) -> Model:
    config = read_model_config(str(path))
    pool = torch.zeros(2, 2, config.num_kv_heads, 4, config.head_dim)
    pools = [pool] * config.num_layers
    backends = TorchRefBackend(spec_of(pool, config.num_heads), pools)
    return build_model(config, weights, sharding, backends)


class Recording(Checkpoint):
    """A checkpoint that remembers which elements of which tensor were asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), CPU, torch.float32)
        self.reads: Counter[str] = Counter()

    def load(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        tensor = super().load(name, shape, part)
        self.reads[name] += tensor.numel()
        return tensor


def test_single_and_sharded_give_the_same_values(single: Path, sharded: Path) -> None:
    whole = load_file(single / "model.safetensors")
    for name, tensor in whole.items():
        shape = tuple(tensor.shape)
        assert torch.equal(checkpoint(single).load(name, shape), tensor)
        assert torch.equal(checkpoint(sharded).load(name, shape), tensor)


def test_a_part_is_read_and_counted_alone(single: Path) -> None:
    heard: list[int] = []
    source = Checkpoint(str(single), CPU, torch.bfloat16, heard.append)
    part = source.load(NAME, SHAPE, (slice(3, 10), slice(8, 24)))
    whole = load_file(single / "model.safetensors")[NAME]
    assert torch.equal(part, whole[3:10, 8:24].to(torch.bfloat16))
    assert source.bytes_read == 7 * 16 * 4, "bytes on disk, which are float32"
    assert heard == [7 * 16 * 2], "bytes in memory, which are bfloat16"


@pytest.mark.parametrize("moe_sharding", ["ep", "tp"])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 9])
def test_ranks_read_their_experts_and_what_is_replicated(
    sharded: Path, moe_sharding: str, dp_size: int
) -> None:
    sizes = {}
    for file in sharded.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                sizes[name] = tensors.get_tensor(name).numel()
    total: Counter[str] = Counter()
    for rank in range(dp_size):
        sharding = RankSharding(moe_sharding, rank, dp_size)
        source, counted = Recording(sharded), MetaWeights(torch.float32, torch.device("cpu"))
        model: Any = build(sharded, source, sharding)
        build(sharded, counted, sharding)
        assert source.bytes_read == counted.bytes_read == 4 * source.reads.total()
        replicated = {name: size for name, size in sizes.items() if ".experts." not in name}
        assert {n: c for n, c in source.reads.items() if ".experts." not in n} == replicated
        total.update({n: c for n, c in source.reads.items() if ".experts." in n})
        shard = sharding.shard(7, 48)
        held = [layer.mlp.experts for layer in model.layers]
        assert all(
            e.gate_up.shape[0] == (0 if shard.is_empty else len(shard.experts)) for e in held
        )
        assert all(e.down.shape[2] < len(shard.intermediate) + 8 for e in held)
    assert total == {name: size for name, size in sizes.items() if ".experts." in name}


def test_tensors_of_other_parts_of_a_checkpoint_are_not_read(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.zeros(64, 128)}, copy / "model.safetensors")
    source = Recording(copy)
    build(copy, source, RankSharding("ep", 0, 1))
    assert set(source.reads) == set(tensors)


def test_dummy_values_depend_on_seed_and_name_alone() -> None:
    def load(
        seed: int, name: str, dtype: torch.dtype = torch.float32, part: Part | None = None
    ) -> Tensor:
        return DummyWeights(seed, CPU, dtype).load(name, (40, 30), part)

    whole = load(0, "a.weight")
    assert torch.equal(load(0, "a.weight"), whole)
    assert torch.equal(load(0, "a.weight", part=(slice(3, 9), slice(None))), whole[3:9])
    assert torch.equal(load(0, "a.weight", torch.bfloat16), whole.bfloat16())
    assert not torch.equal(load(1, "a.weight"), whole)
    assert not torch.equal(load(0, "b.weight"), whole)
    assert whole.std().item() == pytest.approx(0.02, rel=0.1)
    source = DummyWeights(0, CPU, torch.float32)
    assert torch.equal(source.load("norm.weight", (5,)), torch.ones(5))
    assert torch.equal(source.load("q_proj.bias", (5,)), torch.zeros(5))


def test_open_weights(single: Path) -> None:
    opened = [
        open_weights(str(single), load_format, 0, torch.float32, CPU)
        for load_format in ("safetensors", "dummy")
    ]
    assert [type(source) for source in opened] == [Checkpoint, DummyWeights]
    with pytest.raises(ValueError, match="load_format: 'pickle' is not allowed"):
        open_weights(str(single), "pickle", 0, torch.float32, CPU)


def refuse(path: Path, *words: str, name: str = NAME, shape: tuple[int, ...] = SHAPE) -> None:
    """Reading `name` is a one-line ValueError with these words."""
    with pytest.raises(ValueError, match=words[0]) as caught:
        checkpoint(path).load(name, shape)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_missing_tensor_and_wrong_shape(copy: Path) -> None:
    refuse(copy, "tensor nothing.weight is missing", str(copy), name="nothing.weight")
    refuse(copy, NAME, "(199, 64)", "(200, 64)", "model.safetensors", shape=(200, 64))


def test_unsupported_dtype_on_disk(copy: Path) -> None:
    file = copy / "model.safetensors"
    save_file(load_file(file) | {NAME: torch.zeros(SHAPE, dtype=torch.float8_e5m2)}, file)
    refuse(copy, NAME, "dtype: 'F8_E5M2'", "one of F64, F32, F16, BF16, F8_E4M3", str(file))


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refuse(copy, "a directory with model.safetensors or model.safetensors.index.json", str(copy))


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_truncated_file(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(copy, "not a readable safetensors file", str(file))


def test_garbage_header(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(b"garbage!" * 1000)
    refuse(copy, "not a readable safetensors file", str(file))


@pytest.fixture
def sharded_copy(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "sharded"))


def test_missing_shard(sharded_copy: Path) -> None:
    lost = max(sharded_copy.glob("*.safetensors"))
    lost.unlink()
    refuse(sharded_copy, "model.safetensors.index.json", lost.name, "a file beside the index")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_malformed_index(sharded_copy: Path, content: str) -> None:
    (sharded_copy / "model.safetensors.index.json").write_text(content)
    refuse(sharded_copy, "not an index of safetensors", str(sharded_copy))


def test_index_that_names_the_wrong_shard(sharded_copy: Path) -> None:
    path = sharded_copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][NAME] = next(f for f in files if f != index["weight_map"][NAME])
    path.write_text(json.dumps(index))
    refuse(sharded_copy, NAME, index["weight_map"][NAME])


@pytest.mark.parametrize(
    "name",
    ["x" * 4000, "../model.safetensors", "/etc/passwd", "a/../../b.safetensors", ""],
)
def test_shards_are_files_beside_the_index(sharded_copy: Path, name: str) -> None:
    path = sharded_copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NAME] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json") as caught:
        checkpoint(sharded_copy)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_only_regular_files_are_opened(copy: Path, sharded_copy: Path) -> None:
    file = copy / "model.safetensors"
    file.unlink()
    os.mkfifo(file)
    refuse(copy, "a regular file", str(file))
    shard = max(sharded_copy.glob("*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    refuse(sharded_copy, "a regular file", shard.name)


def test_a_single_file_beside_shards_of_another_save(sharded_copy: Path, single: Path) -> None:
    """transformers would read the one and ignore the others."""
    shutil.copy(single / "model.safetensors", sharded_copy)
    refuse(sharded_copy, "model.safetensors.index.json", "keep one")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_shard_whose_name_no_file_can_have(sharded_copy: Path, name: str) -> None:
    index = sharded_copy / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    with pytest.raises(ValueError, match=r"/a\\.*b: no file can have this name") as caught:
        checkpoint(sharded_copy)
    str(caught.value).encode("ascii")


def test_a_scale_that_is_not_in_its_shard_or_no_number(sharded_copy: Path, copy: Path) -> None:
    name = "model.layers.0.self_attn.k_scale"
    index = sharded_copy / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    shard = next(iter(weights.values()))
    index.write_text(json.dumps({"weight_map": weights | {name: shard}}))
    with pytest.raises(ValueError, match=rf"{shard}: {name}: .* does not contain"):
        checkpoint(sharded_copy).scalar(name)
    file = copy / "model.safetensors"
    for value, found in (torch.tensor(0.5), 0.5), (torch.tensor([[0.25]]), 0.25):
        save_file(load_file(file) | {name: value}, file)
        assert checkpoint(copy).scalar(name) == found
    save_file(load_file(file) | {name: torch.tensor([1j])}, file)
    with pytest.raises(ValueError, match=rf"{name}: dtype: 'C64' is not allowed"):
        checkpoint(copy).scalar(name)

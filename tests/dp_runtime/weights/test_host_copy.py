"""A copy in host memory gives what the checkpoint gave, to the bit, or is not used."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dp_runtime.config import EngineConfig
from dp_runtime.core.e4m3 import E4M3
from dp_runtime.errors import StartError
from dp_runtime.startup.build_rank import load_rank
from dp_runtime.startup.loaded_rank import LoadedRank
from dp_runtime.startup.memory_estimate import _tensors
from dp_runtime.startup.rank_plan import plan_rank
from dp_runtime.weights.host_copy import CopyMemory, CopyReader, CopyWriter
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.hybrid_checkpoints import NEXT, VISION, hybrid_checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, E4M3)


@pytest.fixture
def memory() -> Iterator[CopyMemory]:
    made = CopyMemory()
    yield made
    made.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path))


def opened(memory: CopyMemory) -> int:
    descriptor = memory.address.open()
    assert descriptor is not None
    return descriptor


def load(model: Path, memory: CopyMemory | None, dp_rank: int = 1, **fields: Any) -> LoadedRank:
    own: dict[str, Any] = {"dp_size": 3, "num_pages": 20, "max_model_len": 256}
    config = EngineConfig(str(model), device="cpu", launcher="local", **own | fields)
    plan = plan_rank(config, dp_rank, "cpu")
    address = None if memory is None else memory.address
    return load_rank(config, plan, lambda count: None, address)


def bits(rank: LoadedRank) -> list[Tensor]:
    return [one.contiguous().reshape(-1).view(torch.uint8) for one in _tensors(rank.models)]


def same(one: LoadedRank, other: LoadedRank) -> bool:
    pairs = list(zip(bits(one), bits(other), strict=True))
    return bool(pairs) and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"speculative_num_steps": 2, "dtype": "bfloat16"},
        {"moe_sharding": "tp", "load_format": "dummy"},
    ],
)
def test_who_loads_from_a_copy_has_the_same_bits(
    model: Path, memory: CopyMemory, fields: dict[str, Any]
) -> None:
    first = load(model, memory, **fields)
    assert memory.is_finished
    assert same(first, load(model, None, **fields))
    forget_values(model / "model.safetensors")  # which are not read again
    second = load(model, memory, **fields)
    assert same(first, second)
    assert second.info.bytes_read == 0
    shares = {one.data_ptr() for one in bits(first)} & {one.data_ptr() for one in bits(second)}
    assert not shares - {0}


def forget_values(path: Path) -> None:
    """Leave the names of a file's tensors, and zeros."""
    stored = path.read_bytes()
    header = 8 + int.from_bytes(stored[:8], "little")
    path.write_bytes(stored[:header] + bytes(len(stored) - header))


@pytest.mark.parametrize("architecture", [VISION, NEXT])
def test_a_copy_has_the_float32_tensors_of_a_model_in_bf16(
    architecture: str, memory: CopyMemory, tmp_path: Path
) -> None:
    path = hybrid_checkpoint(tmp_path, architecture)
    first = load(path, memory, dtype="bfloat16")
    (path / "model.safetensors").write_bytes(b"")
    assert same(first, load(path, memory, dtype="bfloat16"))
    model: Any = first.models.target
    assert model.norm.weight.dtype == model.layers[0].mixer.decay.dtype == torch.float32


def test_the_copy_of_another_shard_is_not_used(
    model: Path, memory: CopyMemory, caplog: pytest.LogCaptureFixture
) -> None:
    load(model, memory, dp_rank=0)
    with caplog.at_level("INFO", "dp_runtime"):
        other = load(model, memory, dp_rank=1)
    assert same(other, load(model, None, dp_rank=1))
    assert "rank 1: weights from the checkpoint; the copy in host memory is that" in caplog.text


def test_an_unfinished_copy_is_not_used(model: Path, memory: CopyMemory) -> None:
    (model / "model.safetensors").rename(model / "kept")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(model, memory)
    descriptor = opened(memory)
    os.pwrite(descriptor, b"half of a copy", 0)
    os.close(descriptor)
    assert not memory.is_finished
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(model, memory)
    assert not memory.is_finished


def test_a_finished_copy_can_not_change(memory: CopyMemory) -> None:
    descriptor = opened(memory)
    writer = CopyWriter(descriptor, "shard 0")
    writer.add("load a", [torch.ones(3)])
    writer.finish()
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    reader = CopyReader(descriptor, torch.device("cpu"))
    with pytest.raises(AssertionError, match="has load a, not load b"):
        reader.next("load b")
    reader.close()
    os.close(descriptor)


def test_another_host_has_no_copy(memory: CopyMemory) -> None:
    assert replace(memory.address, host=f"not-{socket.gethostname()}").open() is None
    assert replace(memory.address, name="another").open() is None


def test_a_host_without_room_is_told_with_numbers(
    model: Path, memory: CopyMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = psutil.virtual_memory()._replace(available=1 << 10)
    monkeypatch.setattr("psutil.virtual_memory", lambda: full)
    with pytest.raises(StartError, match=r"host_weights: .* takes .* and 0\.00 GiB are available"):
        load(model, memory)


def test_the_plan_counts_the_copy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"dp_size": 3, "launcher": "local", "device": "cpu", "num_pages": 20}
    config = EngineConfig(str(model), max_model_len=256, host_weights=True, **fields)
    plan = plan_rank(config, 0, "cpu")
    enough = 3 * (plan.memory.total + plan.load_bytes)
    limits = "dp_runtime.startup.device_memory.usable_memory"
    monkeypatch.setattr(limits, lambda: enough)
    plan_rank(config, 0, "cpu")
    plan_rank(replace(config, host_weights=False), 0, "cpu")
    monkeypatch.setattr(limits, lambda: enough - 3)
    plan_rank(replace(config, host_weights=False), 0, "cpu")
    with pytest.raises(ValueError, match="num_pages: 20 is not allowed"):
        plan_rank(config, 0, "cpu")


shapes = st.lists(st.integers(0, 5), max_size=3)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=6), st.integers(0, 2**31))
def test_tensors_of_any_kind_come_back(
    kinds: list[tuple[torch.dtype, list[int]]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(shape, generator=generator).mul(9).to(dtype).transpose(0, -1)
        if shape
        else torch.tensor(1.5).to(dtype)
        for dtype, shape in kinds
    ]
    memory = CopyMemory()
    descriptor = opened(memory)
    writer = CopyWriter(descriptor, "one")
    for number, tensor in enumerate(tensors):
        writer.add(str(number), [tensor], value=number / 7)
    writer.finish()
    reader = CopyReader(descriptor, torch.device("cpu"))
    assert reader.identity == "one"
    for number, tensor in enumerate(tensors):
        entry = reader.next(str(number))
        (stored,) = entry.tensors
        found = reader.tensor(stored)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.float(), tensor.float())
        assert entry.value == number / 7
    reader.check_all_read()
    reader.close()
    os.close(descriptor)
    memory.close()

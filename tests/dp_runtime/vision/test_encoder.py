"""The vision encoder against transformers' in float32; its weights are all read, or none is."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_runtime import EngineConfig
from dp_runtime.models.registry import read_model_config
from dp_runtime.startup.rank_plan import plan_rank
from dp_runtime.vision.encoder import VisionEncoder
from dp_runtime.vision.patch_grid import PatchGrid
from dp_runtime.weights.dummy import MetaWeights
from dp_runtime.weights.loader import Checkpoint, open_weights
from tests.dp_runtime.live_bytes import LiveBytes
from tests.dp_runtime.paged import CPU
from tests.hybrid_checkpoints import VISION, hybrid_checkpoint, oracle, read

GRIDS = [PatchGrid(2, 2), PatchGrid(4, 10), PatchGrid(10, 4), PatchGrid(2, 18), PatchGrid(16, 16)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hybrid_checkpoint(tmp_path_factory.mktemp("vision"), VISION)


@cache
def expected_by(model: Path) -> Any:
    return oracle(model).model.visual


def encoder_of(model: Path, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    config = read_model_config(str(model)).vision
    assert config is not None
    weights = open_weights(str(model), "safetensors", 0, dtype, CPU)
    return VisionEncoder.load(config, weights, "model.visual")


def pixels_of(encoder: VisionEncoder, grids: list[PatchGrid]) -> Tensor:
    count = sum(grid.num_patches for grid in grids)
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, encoder.config.patch_values, generator=generator)


def expected_features(model: Path, pixels: Tensor, grids: list[PatchGrid]) -> Tensor:
    frames = pixels.view(len(pixels), 3, 1, -1).expand(-1, -1, 2, -1).flatten(1)
    grid_thw = torch.tensor([(1, *grid) for grid in grids])
    with torch.inference_mode():
        features: Tensor = expected_by(model)(frames, grid_thw=grid_thw).pooler_output
        return features


@pytest.mark.parametrize("grids", [GRIDS, [PatchGrid(6, 8)], [PatchGrid(4, 4)] * 3], ids=str)
def test_features_are_those_of_transformers(grids: list[PatchGrid], model: Path) -> None:
    encoder = encoder_of(model)
    pixels = pixels_of(encoder, grids)
    with torch.inference_mode():
        found = encoder(pixels, grids)
    expected = expected_features(model, pixels, grids)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_image_is_encoded_alike_alone_and_beside_others(model: Path) -> None:
    encoder = encoder_of(model)
    pixels = pixels_of(encoder, GRIDS)
    counts = [grid.num_patches for grid in GRIDS]
    with torch.inference_mode():
        alone = [encoder(part, [grid]) for part, grid in zip(pixels.split(counts), GRIDS)]
        torch.testing.assert_close(encoder(pixels, GRIDS), torch.cat(alone), atol=1e-5, rtol=0)


def test_bfloat16_is_near_float32(model: Path) -> None:
    grids = [PatchGrid(8, 8)]
    wide, narrow = encoder_of(model), encoder_of(model, torch.bfloat16)
    pixels = pixels_of(wide, grids)
    with torch.inference_mode():
        gap = (wide(pixels, grids) - narrow(pixels, grids).float()).abs()
    assert gap.median() < 0.05


@pytest.mark.parametrize("num_tokens", [16, 100])
def test_bytes_of_a_call_are_bounded_by_the_estimate(num_tokens: int, model: Path) -> None:
    encoder = encoder_of(model)
    grids = [PatchGrid(4, num_tokens)]
    pixels = pixels_of(encoder, grids)
    with torch.inference_mode(), LiveBytes() as live:
        encoder(pixels, grids)
    assert live.peak <= encoder.activation_bytes(num_tokens) < 3 * live.peak


def test_all_of_its_tensors_are_read(model: Path) -> None:
    config = read_model_config(str(model)).vision
    source = Checkpoint(str(model), CPU, torch.float32)
    assert config is not None
    VisionEncoder.load(config, source, "model.visual")
    tensors = [tensor for name, tensor in read(model).items() if "visual" in name]
    assert source.bytes_read == sum(tensor.nbytes for tensor in tensors)


def test_its_memory_is_planned(model: Path) -> None:
    def weights_of(**fields: Any) -> int:
        config = EngineConfig(str(model), device="cpu", launcher="thread", **fields)
        return plan_rank(config, 0, "cpu").memory.weights

    config = read_model_config(str(model)).vision
    assert config is not None
    meta = MetaWeights(torch.float32, CPU)
    VisionEncoder.load(config, meta, "model.visual")
    frame = config.hidden_size * config.patch_values * 4  # of the two of a patch one is kept
    assert weights_of() - weights_of(language_model_only=True) == meta.bytes_read - frame

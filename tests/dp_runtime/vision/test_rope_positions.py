"""Positions of tokens beside images, against transformers'; each pair turns by its own of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

from dp_runtime import SamplingParams
from dp_runtime.core.request import RankRequest
from dp_runtime.layers.rotary import Rotary
from dp_runtime.models.registry import read_model_config
from dp_runtime.scheduler.request_state import RequestState
from dp_runtime.vision.placeholders import expanded
from dp_runtime.vision.rope_positions import rope_positions
from tests.dp_runtime.paged import CPU
from tests.dp_runtime.prompt_images import prompt_image
from tests.hybrid_checkpoints import IMAGE_TOKEN, VISION, hybrid_checkpoint
from tests.image_checkpoints import ImageReference, Pictured, picture


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ImageReference:
    return ImageReference(hybrid_checkpoint(tmp_path_factory.mktemp("rope"), VISION))


PROMPTS = {
    "one": ((3,), (4, 7), (5,)),
    "adjacent": ((2,), (2, 2), (3, 5), (1,)),
    "at both ends": ((4, 1), (6,), (1, 8)),
    "tall and wide": ((1,), (8, 1), (2,), (1, 8), (2,), (3, 3)),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_positions_are_those_of_transformers_35(name: str, reference: ImageReference) -> None:
    parts = [[7] * part[0] if len(part) == 1 else picture(*part) for part in PROMPTS[name]]
    pictured = Pictured.of(*parts)
    images = [prompt_image(*part) for part in PROMPTS[name] if len(part) == 2]
    tokens, placed = expanded(pictured.short, images, IMAGE_TOKEN)
    assert tokens == pictured.tokens
    assert [range(one.start, one.end) for one in placed] == pictured.spans
    expected, delta = reference.positions(pictured)
    found, found_delta = rope_positions(len(tokens), placed)
    assert found.tolist() == expected.tolist()
    assert found_delta == delta


def test_slices_of_a_request_are_those_of_the_whole_33() -> None:
    """By chunk, also where outputs are computed again after the prompt."""
    images = [prompt_image(3, 2), prompt_image(1, 4)]
    tokens, placed = expanded((5, IMAGE_TOKEN, 6, IMAGE_TOKEN), images, IMAGE_TOKEN)
    request = RankRequest(
        0, tokens, SamplingParams(), 0, frozenset(), images=placed, outputs=(9, 9, 9)
    )
    state = RequestState(request, 5)
    whole, delta = rope_positions(len(tokens) + 3, placed)
    assert state.rope_delta == delta < 0
    for start in range(len(tokens) + 3):
        for end in range(start, len(tokens) + 4):
            assert state.rope(start, end).tolist() == whole[:, start:end].tolist()


def test_height_and_width_turn_their_pairs_32(tmp_path: Path) -> None:
    """Not the time alone: cosines of rows of an image are transformers'."""
    path = hybrid_checkpoint(tmp_path, VISION, head_dim=128)
    config = read_model_config(str(path))
    assert config.rope.mrope_section == (6, 5, 5)
    rotary = Rotary.from_config(config.rope, config.head_dim, CPU)
    positions = torch.from_numpy(rope_positions(40, [prompt_image(4, 6, 3)])[0])
    text = AutoConfig.from_pretrained(path).text_config
    expected = Qwen3_5MoeTextRotaryEmbedding(text)(torch.zeros(1), positions[:, None])
    for found, due in zip(rotary(positions, torch.float32), expected, strict=True):
        torch.testing.assert_close(found[:, 0, :16], due[0, :, :16])
    same = torch.arange(40)
    for found, due in zip(rotary(same.expand(3, -1), torch.float32), rotary(same, torch.float32)):
        assert torch.equal(found, due)

"""No step makes the host wait for the GPU: else the two take turns."""

import multiprocessing
import tempfile
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dp_runtime import EngineConfig, SamplingParams
from dp_runtime.core.request import RankRequest
from dp_runtime.models.image_format import read_image_format
from dp_runtime.models.registry import read_model_config
from dp_runtime.runner.image_encoding import ImageEncoding
from dp_runtime.runner.step_runner import StepRunner
from dp_runtime.scheduler.image_slots import PlacedImage
from dp_runtime.vision.encoder import VisionEncoder
from dp_runtime.weights.loader import open_weights
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.dp_runtime.prompt_images import prompt_image
from tests.gpu.hybrid import gpu_checkpoint
from tests.hybrid_checkpoints import VISION, hybrid_checkpoint
from workers.messages import Rendezvous
from workers.worker import Worker

PROMPTS = ((1, 2, 3), (4,) * 40, (5, 6) * 70)
PARAMS = (
    SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, top_k=20, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=12, logprobs=2, logit_bias={3: 1.0}, min_tokens=3),
)


def serve(model: str, graphs: bool, num_steps: int) -> None:
    """In a process of its own: serve requests while an operation that waits is an error."""
    config = EngineConfig(
        model, device="cuda", launcher="local", max_model_len=256, num_pages=50,
        cuda_graphs=graphs, speculative_num_steps=num_steps,
    )  # fmt: skip
    run, guarded = StepRunner.run, {"on": False}

    def run_guarded(runner: StepRunner, *args: Any, **fields: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if guarded["on"] else "default")
        try:
            return run(runner, *args, **fields)
        except RuntimeError:
            traceback.print_exc()  # a rank's error is its message alone
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with mock.patch.object(StepRunner, "run", run_guarded), tempfile.TemporaryDirectory() as at:
        worker = Worker(0, config, "cuda:0")
        worker.prepare()
        worker.load()
        worker.join(Rendezvous("peer_to_peer", f"{at}/meeting"))
        guarded["on"] = True
        worker.submit(
            [
                RankRequest(number, prompt, params, number, frozenset())
                for number, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
            ]
        )
        ended = 0
        while ended < len(PROMPTS):
            polled = worker.poll(30.0)
            assert polled.error is None, polled.error
            assert polled.progress, "requests end within 30 s"
            ended += sum(item.finish_reason is not None for item in polled.progress)
        worker.stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_a_launch_does_not_wait_for_the_device(
    tmp_path: Path, kind: str, graphs: bool, num_steps: int
) -> None:
    sizes: dict[str, Any] = {"head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 2}
    if kind == "hybrid":
        model = str(gpu_checkpoint(tmp_path))
    else:
        model = str(add_mtp(tiny_checkpoint(tmp_path, **sizes)))
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(model, graphs, num_steps))
    process.start()
    process.join()
    assert process.exitcode == 0


def encoding(model: Path, device: torch.device) -> ImageEncoding:
    """A random encoder with room for the features of 100 tokens."""
    config = read_model_config(str(model))
    assert config.vision is not None
    weights = open_weights(str(model), "safetensors", 0, torch.bfloat16, device)
    encoder = VisionEncoder.load(config.vision, weights, "model.visual")
    features = torch.zeros(100, config.hidden_size, dtype=torch.bfloat16, device=device)
    image_format = read_image_format(str(model), config.vision)
    return ImageEncoding(encoder, image_format, features, 50)


@torch.inference_mode()
def test_images_are_encoded_without_waiting(tmp_path: Path) -> None:
    images = encoding(hybrid_checkpoint(tmp_path, VISION), torch.device("cuda"))
    placed = [PlacedImage(prompt_image(2, 3), np.arange(6)),
              PlacedImage(prompt_image(9, 5, seed=1), np.arange(6, 51))]  # fmt: skip
    images.encode(placed)  # libraries may wait while they set themselves up
    first = images.features.clone()
    images.features.zero_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images.encode(placed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(images.features, first)
    assert first[:51].any(1).all()
    assert not first[51:].any()

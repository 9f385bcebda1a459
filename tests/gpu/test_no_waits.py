"""No step makes the host wait for the GPU: else the two take turns."""

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dp_runtime import EngineConfig, SamplingParams
from dp_runtime.core.request import RankRequest
from dp_runtime.runner.step_runner import StepRunner
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.gpu.hybrid import gpu_checkpoint
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

    def run_guarded(runner: StepRunner, *args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if guarded["on"] else "default")
        try:
            return run(runner, *args)
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
    sizes: dict[str, Any] = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "hybrid":
        model = str(gpu_checkpoint(tmp_path))
    else:
        model = str(add_mtp(tiny_checkpoint(tmp_path, **sizes)))
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(model, graphs, num_steps))
    process.start()
    process.join()
    assert process.exitcode == 0

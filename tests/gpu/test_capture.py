"""Ranks on GPUs serve after a fault while they capture their graphs again, and may be disturbed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams
from dp_runtime.core.request import FinishReason
from dp_runtime.metrics.status import RankHealth, RankState
from tests.checkpoints import tiny_checkpoint
from tests.gpu.peers import ALL_EXPERTS, FEW_POSITIONS, compare
from tests.gpu.test_engine import prompts
from tests.serving import check_pages_free
from tests.workers.leftovers import wait_until

PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
# The second comes while graphs are captured: ranks leave that, and their processes stay.
FAULTS = "rank=0,step=4,kind=oom;rank=0,step=1,kind=oom,epoch=1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("gpu"), hidden_size=256, num_attention_heads=16,
        num_key_value_heads=2, head_dim=128, moe_intermediate_size=64, **ALL_EXPERTS,
    )  # fmt: skip


def settled(engine: Engine) -> list[RankHealth]:
    def idle() -> bool:
        return {rank.state for rank in engine.health()} == {RankState.IDLE}

    wait_until(idle, "all graphs are captured", 60.0)
    return list(engine.health())


def serve_disturbed(engine: Engine) -> list[RequestOutput]:
    """Serve prompts beside each other, until both faults have ended the prompt that they hit."""
    params = replace(PARAMS, max_tokens=200)
    handles = [engine.submit(prompt, params) for prompt in prompts()]
    while {rank.epoch for rank in engine.health()} != {2}:
        for prompt in prompts():
            handles.append(engine.submit(prompt, PARAMS))
            wait_until(lambda: handles[-1].done, "it has ended", 60.0)
    wait_until(lambda: all(handle.done for handle in handles), "all have ended", 60.0)
    outputs = [handle.output for handle in handles if handle.output is not None]
    assert len(outputs) == len(handles) - 2
    return outputs


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("collective", ["auto", "torch_distributed"])
def test_graphs_are_captured_again_by_ranks_that_serve(
    checkpoint: Path, dp_size: int, collective: str
) -> None:
    shares = torch.cuda.device_count() < dp_size
    if shares and collective == "torch_distributed":
        pytest.skip(f"{dp_size} GPUs are needed, {torch.cuda.device_count()} are here")
    config = EngineConfig(
        str(checkpoint), launcher="local", device="cuda", dp_size=dp_size, max_model_len=512,
        num_pages=200, attention_backend="trtllm", inject=FAULTS, cuda_graphs=True,
        collective="peer_to_peer" if shares else collective, ranks_per_gpu=dp_size if shares else 1,
    )  # fmt: skip
    with Engine(config) as engine:
        before = settled(engine)
        disturbed = serve_disturbed(engine)
        after = settled(engine)
        for old, new in zip(before, after, strict=True):
            assert (new.pid, new.epoch) == (old.pid, 2), "the process of each rank survives"
            assert old.graphs is not None
            assert new.graphs is not None
            assert new.graphs.count == old.graphs.count == new.graphs_captured
            assert new.graphs.num_bytes < 1.5 * old.graphs.num_bytes + (64 << 20)
        again = engine.generate(prompts(), PARAMS)
        check_pages_free(engine)
    assert all(output.finish_reason is FinishReason.LENGTH for output in again)
    for outputs, when in ((disturbed, "while they capture"), (again, "from graphs of epoch 2")):
        compare(checkpoint, outputs)[1].check(f"{dp_size} ranks, {when}", FEW_POSITIONS)

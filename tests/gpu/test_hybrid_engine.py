"""A hybrid model served by GPU ranks, against transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams
from examples.nvl4.shape import write_shape
from tests.gpu.hybrid import gpu_checkpoint
from tests.gpu.peers import ALL_EXPERTS, FEW_POSITIONS, compare
from tests.gpu.test_engine import IN_CHUNKS, prompts
from tests.gpu.test_memory import near
from tests.serving import check_pages_free

SPECULATIVE = {"speculative_num_steps": 3}
CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {"cuda_graphs": False}),
    (1, {}),
    (1, SPECULATIVE | {"cuda_graphs": False}),
    (1, SPECULATIVE),
    (1, {"speculative_num_steps": 7, "max_num_requests": 3}),
    (1, IN_CHUNKS | SPECULATIVE | {"num_pages": 14}),
    (1, {"attention_backend": "torch_ref", "dtype": "float32", "moe_backend": "torch"}),
    (2, {"poison_padding": True}),
    (2, SPECULATIVE | {"poison_padding": True, "speculative_adaptive": True}),
    (2, {"moe_sharding": "tp", "padding": "ragged", "collective": "torch_distributed"}),
    (4, IN_CHUNKS | {"poison_padding": True}),
    (4, IN_CHUNKS | SPECULATIVE),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_checkpoint(tmp_path_factory.mktemp("hybrid"), **ALL_EXPERTS)


def need(dp_size: int) -> None:
    if torch.cuda.device_count() < dp_size:
        pytest.skip(f"{dp_size} GPUs are needed, {torch.cuda.device_count()} are here")


def serve(model: Path, ranks: list[int] | None = None, **changes: Any) -> list[RequestOutput]:
    fields = {"max_model_len": 512, "num_pages": 200, "start_timeout_s": 600.0} | changes
    with Engine(EngineConfig(str(model), launcher="local", device="cuda", **fields)) as engine:
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
        outputs = engine.generate(prompts(), params, ranks)
        check_pages_free(engine)
    return outputs


def check_near(model: Path, outputs: list[RequestOutput], what: str) -> None:
    compare(model, outputs, "cpu")[1].check(what, FEW_POSITIONS)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("dp_size", "changes"), CASES, ids=str)
def test_bf16_is_as_near_to_float32_as_transformers_is(
    checkpoint: Path, dp_size: int, changes: dict[str, Any]
) -> None:
    need(dp_size)
    outputs = serve(checkpoint, dp_size=dp_size, **changes)
    check_near(checkpoint, outputs, f"{dp_size} ranks, {changes}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("changes", [{}, SPECULATIVE], ids=str)
def test_a_rank_without_requests_10(checkpoint: Path, changes: dict[str, Any]) -> None:
    need(2)
    ranks = [1] * len(prompts())
    outputs = serve(checkpoint, ranks, dp_size=2, poison_padding=True, **changes)
    check_near(checkpoint, outputs, f"all on rank 1, {changes}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("graphs", [True, False])
def test_drafts_are_accepted_and_change_nothing(checkpoint: Path, graphs: bool) -> None:
    """Near ties may fall otherwise, as verifications round in other kernels."""
    tokens, accepted = [], 0.0
    for steps in (0, 3):
        config = EngineConfig(
            str(checkpoint), launcher="local", device="cuda", max_model_len=512, num_pages=200,
            cuda_graphs=graphs, speculative_num_steps=steps,
        )  # fmt: skip
        with Engine(config) as engine:
            params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
            tokens.append([output.token_ids for output in engine.generate(prompts(), params)])
            accepted = engine.report().tokens_per_verification
    assert accepted > 1.1
    pairs = [pair for one, other in zip(*tokens) for pair in zip(one, other, strict=True)]
    assert sum(one == other for one, other in pairs) > 0.7 * len(pairs)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fields", [{}, SPECULATIVE], ids=str)
def test_a_rank_uses_what_was_predicted_13(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = write_shape(tmp_path, "qwen3.5-35b-a3b", mtp_layers=1, num_layers=8)
    config = EngineConfig(
        str(model), load_format="dummy", device="cuda", launcher="local", max_model_len=4096,
        max_num_requests=64, max_num_tokens=4096, start_timeout_s=900.0, **fields,
    )  # fmt: skip
    with Engine(config) as engine:
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        engine.generate([list(range(n, n + 500)) for n in range(8)], params)
        check_pages_free(engine)
        (rank,) = engine.health()
    assert rank.memory is not None
    predicted, found = rank.memory.predicted, rank.memory.measured
    assert found is not None
    print(f"\npredicted {predicted}\nmeasured {found}")
    assert found.recurrent_state == predicted.recurrent_state
    assert found.weights == pytest.approx(predicted.weights, rel=0.01)
    assert near(found.workspaces, predicted.workspaces)
    assert near(found.activations, predicted.activations)

"""What a rank's memory is predicted to be, against what its tensors take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from collectives.in_process import InProcessGroup
from dp_runtime import EngineConfig
from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.errors import StartError
from dp_runtime.layers import experts
from dp_runtime.metrics.memory import MemoryUse, RankMemory, memory_table
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.scheduler.limits import Limits
from dp_runtime.startup import rank_plan as sizing
from dp_runtime.startup.build_rank import assemble, check_free, load_rank, new_flight
from dp_runtime.startup.device_memory import CUBLAS_BYTES, CUDA_RESERVE
from dp_runtime.startup.loaded_rank import LoadedRank
from dp_runtime.startup.memory_profile import largest_load, run_largest_steps
from dp_runtime.startup.rank_plan import RankPlan, plan_rank
from tests.dp_runtime.live_bytes import LiveBytes, attend_frugally, exchange_in_step
from tests.test_bytes_read import storage_bytes, weights_in

MIB = 2**20
SMALL = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
    "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 60, "eos_token_id": 0,
    "intermediate_size": 768, "norm_topk_prob": True, "vocab_size": 500, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "rope_theta": 1e6, "max_position_embeddings": 4096,
}  # fmt: skip
QWEN3_30B_A3B = SMALL | {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip


def directory(path: Path, **changes: Any) -> str:
    (path / "config.json").write_text(json.dumps(SMALL | changes))
    return str(path)


@dataclass(frozen=True, eq=False)
class Ready:
    """A rank that could serve now."""

    plan: RankPlan
    loaded: LoadedRank
    loop: StepLoop


def on_ranks(model: str, run: Callable[[Ready], Any], **fields: Any) -> list[Any]:
    """What `run` returns on every rank of a config."""
    fields = dict[str, Any](max_model_len=300, load_format="dummy") | fields
    config = EngineConfig(model, launcher="thread", **fields)
    group = InProcessGroup(config.dp_size, 30.0)

    def run_rank(dp_rank: int) -> Any:
        plan = plan_rank(config, dp_rank, "cpu")
        loaded = load_rank(config, plan, lambda count: None)
        board, collective = group.board(dp_rank), group.collective(dp_rank)
        flight = new_flight(config, plan)
        loop = assemble(config, plan, loaded, board, collective, flight)
        return run(Ready(plan, loaded, loop))

    with ThreadPoolExecutor(config.dp_size) as pool:
        return list(pool.map(run_rank, range(config.dp_size)))


def predicted_and_live(ready: Ready) -> tuple[int, int]:
    with LiveBytes() as live:
        run_largest_steps(ready.loop, ready.loaded)
    return ready.plan.memory.activations, live.peak


CASES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "ep": {"dp_size": 2, "dtype": "bfloat16", "max_num_tokens": 560},
    "tp": {"dp_size": 2, "moe_sharding": "tp"},
    "ragged": {"dp_size": 3, "moe_sharding": "tp", "padding": "ragged", "dtype": "bfloat16"},
    "whole": {"dp_size": 2, "moe_sharding": "tp", "pairs": 10**6},
    "dense": {"model": {"mlp_only_layers": [0, 1]}},
    "samples": {"max_num_tokens": 130, "max_num_requests": 100, "model": {"vocab_size": 9000}},
    "scores": {"max_num_requests": 1, "model": {"vocab_size": 9000}, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", CASES)
def test_activations_are_predicted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"max_num_tokens": 512, "max_num_requests": 8, "max_model_len": 600} | CASES[name]
    monkeypatch.setattr(experts, "PAIRS_AT_ONCE", fields.pop("pairs", 700))
    model = directory(tmp_path, **fields.pop("model", {}))
    attend_frugally(monkeypatch)
    exchange_in_step(monkeypatch)
    for predicted, live in on_ranks(model, predicted_and_live, **fields):
        print(f"{name}: predicted {predicted / MIB:.2f} MiB, live {live / MIB:.2f} MiB")
        assert live > 4 * MIB
        assert 0.95 * live < predicted < 1.1 * live


def test_what_the_products_need_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, hidden, inner = 96, 64, 16
    gate_up, down = torch.randn(6, 2 * inner, hidden), torch.randn(6, hidden, inner)
    weights, ids = torch.rand(rows, 8).topk(3, -1)
    arguments = (torch.randn(rows, hidden), gate_up[2:], down[2:], ids, weights, 2)
    whole = experts.fused_experts(*arguments)
    peaks = []
    for pairs in (10**6, 50, 7, 1):
        monkeypatch.setattr(experts, "PAIRS_AT_ONCE", pairs)
        with LiveBytes() as live:
            sums = experts.fused_experts(*arguments)
        torch.testing.assert_close(sums, whole, atol=1e-3, rtol=1e-3)
        peaks.append(live.peak)
    assert peaks[0] > 2 * peaks[1] > 2.5 * peaks[2] > 2.5 * peaks[3]


@pytest.mark.parametrize("sharding", ["ep", "tp"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_predicted_exactly(tmp_path: Path, sharding: str, tied: bool) -> None:
    def held(ready: Ready) -> tuple[int, int]:
        return ready.plan.memory.weights, storage_bytes(weights_in(ready.loaded.models))

    fields = {"dp_size": 3, "moe_sharding": sharding, "dtype": "bfloat16"}
    for predicted, found in on_ranks(directory(tmp_path, tie_word_embeddings=tied), held, **fields):
        assert predicted == found


def traces(loop: StepLoop) -> tuple[Any, ...]:
    """Whatever a step changes."""
    scheduler, coordinator = loop.scheduler, loop.coordinator
    scheduler.check()
    return (
        scheduler.num_free_pages, list(scheduler.page_table.allocator._free), scheduler.has_work,
        scheduler.num_preemptions, coordinator.step_id, coordinator.epoch, coordinator.program,
        len(loop.sampler), list(loop.recorder.steps), loop.recorder.totals.copied(),
        loop.last_finished[0], loop.runner.last_sampled.tolist(),
    )  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("max_num_tokens", [1, 40, 700])
def test_the_largest_steps_leave_no_trace(
    tmp_path: Path, max_num_tokens: int, overlap: bool
) -> None:
    random_state = torch.get_rng_state()

    def run(ready: Ready) -> None:
        before = traces(ready.loop)
        with LiveBytes() as live:
            run_largest_steps(ready.loop, ready.loaded)
        assert live.peak > 0, "steps ran"
        assert traces(ready.loop) == before
        assert all(not pool.any() for pool in ready.loaded.pools), "pages are as fresh as before"

    # few pages: the load must fit them
    on_ranks(
        directory(tmp_path), run, dp_size=3, max_num_tokens=max_num_tokens,
        max_num_requests=min(4, max_num_tokens), num_pages=30, page_size=16, overlap=overlap,
        poison_padding=True,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("dp_rank", [0, 1])
@pytest.mark.parametrize(("requests", "tokens", "length", "pages"), [
    (8, 2048, 4096, 2000), (8, 2048, 300, 2000), (64, 64, 300, 70), (1, 1, 2, 2), (8, 64, 65, 3),
])  # fmt: skip
def test_the_largest_load_fits_its_limits(
    requests: int, tokens: int, length: int, pages: int, dp_rank: int
) -> None:
    limits, geometry = Limits(requests, tokens, length), PageGeometry(pages, 64)
    load = list(largest_load(limits, geometry, dp_rank, 500))
    lengths = [len(request.prompt_token_ids) for request in load]
    rows = max(1, tokens - (dp_rank > 0))
    assert sum(lengths) <= rows
    assert all(1 <= one < length for one in lengths)
    assert sum(-(-(one + 2) // 64) for one in lengths) < pages
    if pages > 60:
        assert len(lengths) == min(requests, rows)
        assert sum(lengths) == min(rows, requests * (length - 1))
    assert lengths, "every rank samples: what a request can ask for is built before it asks"


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    properties = SimpleNamespace(total_memory=int(gib * 2**30), major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(sizing, "choose_backend", lambda *arguments: ("trtllm", "for the test"))
    monkeypatch.setattr(psutil, "virtual_memory", None)


@pytest.mark.parametrize("sharding", ["ep", "tp"])
@pytest.mark.parametrize("dp_size", [2, 4])
def test_the_plan_of_qwen3_30b_a3b(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharding: str, dp_size: int
) -> None:
    on_a_gpu(monkeypatch, 79.1)
    layers = 4  # of 48, which all are alike
    model = directory(tmp_path, **QWEN3_30B_A3B | {"num_hidden_layers": layers})
    config = EngineConfig(
        model, dp_size=dp_size, moe_sharding=sharding, max_num_requests=500, device="cuda"
    )
    plans = [plan_rank(config, rank, "cuda:0") for rank in range(dp_size)]
    use, pages = plans[0].memory, plans[0].pages.num_pages
    assert all((plan.memory, plan.pages) == (use, plans[0].pages) for plan in plans)
    attention = 2 * 2048 * (32 * 128) + 2 * 2048 * (4 * 128)
    expert = 128 * 3 * 2048 * 768 // dp_size
    parameters = layers * (attention + expert + 128 * 2048) + 2 * 151936 * 2048
    assert use.weights == pytest.approx(2 * parameters, rel=1e-3)
    assert 0.3e9 < use.activations < 1.5e9
    assert use.workspaces > CUBLAS_BYTES
    buffers = 2 * dp_size * config.max_num_tokens * 2048 * 2  # of the peer-to-peer collectives
    left = int(79.1 * 2**30) - CUDA_RESERVE - buffers - (use.total - use.kv_cache)
    assert use.kv_cache == pages * plans[0].page_bytes
    captured = left - use.kv_cache / 0.9
    logits = 500 * 151936 * 2  # of the graphs, which also keep what one of each kind needs
    assert plans[0].graphs == (plans[0].moe_backend == "triton")

    assert logits < captured < 1e9 if plans[0].graphs else captured < plans[0].page_bytes


def test_ranks_that_share_a_gpu_share_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, 12.0)
    config = EngineConfig(
        directory(tmp_path), dp_size=2, device="cuda", max_num_requests=20_000,
        max_num_tokens=20_000, kv_memory_fraction=1.0, cuda_graphs=False,
    )  # fmt: skip
    one, two = (plan_rank(replace(config, ranks_per_gpu=shared), 0, "cuda:0") for shared in (1, 2))
    fewer = one.pages.num_pages - two.pages.num_pages
    assert fewer == pytest.approx(6 * 2**30 / one.page_bytes, abs=1)


def test_a_gpu_that_others_use_is_a_start_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, 80.0)
    plan = plan_rank(EngineConfig(directory(tmp_path), max_model_len=512), 0, "cuda:0")
    check_free(plan, plan.memory.total)
    with pytest.raises(StartError) as error:
        check_free(plan, plan.memory.total - 1)
    text = str(error.value)
    assert text.startswith("rank 0: cuda:0 has 0.")
    for word in ("are planned", "KV pages", "end other processes", "kv_memory_fraction"):
        assert word in text


def test_the_table_has_both_where_both_are_known() -> None:
    use = MemoryUse(5 * MIB, 0, 3 * MIB // 2, 2048 * MIB)
    alone = memory_table([RankMemory(1, use)])
    assert "only running GPU ranks measure it" in alone
    assert alone.splitlines()[-1].split() == ["1", "5.0", "0.0", "1.5", "2,048.0"]
    both = memory_table([RankMemory(0, use, replace(use, weights=6 * MIB))])
    assert "predicted / measured" in both
    assert "5.0 / 6.0" in both


LOADING = """
import psutil, sys, torch
from dp_runtime.weights import loader
loader.MAPPED_BYTES = 8 << 20
source = loader.Checkpoint(sys.argv[1], torch.device("cpu"), torch.float32)
resident = lambda: psutil.Process().memory_info().rss
before, peak, tensors = resident(), 0, []
for i in range(30):
    tensors.append(source.load(f"t{i}.weight", (1024, 1024)))
    peak = max(peak, resident())
print(peak - before)
"""


def test_host_memory_does_not_hold_the_model_twice(tmp_path: Path) -> None:
    size = 30 * 4 * MIB
    save_file(
        {f"t{i}.weight": torch.ones(1024, 1024) for i in range(30)}, tmp_path / "model.safetensors"
    )
    arguments = [sys.executable, "-c", LOADING, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert 0.99 * size < int(done.stdout) < 1.25 * size

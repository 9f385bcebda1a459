"""Memory of a model whose layers have pages or a recurrent state, as it lists them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dp_runtime import EngineConfig
from dp_runtime.metrics.memory import RankMemory, memory_table
from dp_runtime.runner.graphs.forward_pieces import PieceInputs
from dp_runtime.scheduler.limits import default_checkpoints, most_requests
from dp_runtime.startup import memory_plan, rank_plan
from dp_runtime.startup.build_rank import load_rank, reload_rank
from dp_runtime.startup.inspection import describe
from dp_runtime.startup.loaded_rank import KeptCaches
from dp_runtime.startup.memory_estimate import captured_bytes, param_bytes
from dp_runtime.startup.rank_plan import plan_rank, sketch_rank
from examples.nvl4.shape import write_shape
from tests.checkpoints import tiny_checkpoint
from tests.dp_runtime.hybrid import hybrid_checkpoint, is_recurrent
from tests.dp_runtime.startup.test_memory import on_a_gpu
from tests.hybrid_checkpoints import add_mtp
from tests.hybrid_checkpoints import hybrid_checkpoint as qwen3_5_checkpoint

HIDDEN = 64
SLOT = 2 * (HIDDEN * 4 + HIDDEN * 8)  # of the two recurrent layers
PAGE = 2 * 2 * 2 * 16 * 16 * 4  # of the two layers that attend: K and V, heads, tokens, head_dim
REQUESTS = 5


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    model = hybrid_checkpoint(tmp_path, monkeypatch)
    return EngineConfig(
        str(model), max_model_len=256, page_size=16, max_num_requests=REQUESTS, max_num_tokens=64,
        device="cpu", launcher="thread",
    )  # fmt: skip


def test_pages_are_of_the_layers_that_attend_and_states_of_the_others(config: EngineConfig) -> None:
    plan = plan_rank(config, 0, "cpu")
    assert (plan.page_bytes, plan.slot_bytes) == (PAGE, SLOT)
    assert plan.limits.keeps_state
    assert plan.memory.kv_cache == plan.pages.num_pages * PAGE
    assert plan.memory.recurrent_state == (REQUESTS + 8 + 1) * SLOT, "8 for the prefix cache"
    rank = load_rank(config, plan, lambda count: None)
    assert sum(pool.nbytes for pool in rank.pools) == plan.memory.kv_cache
    assert [len(state) for state in rank.states] == [2 * is_recurrent(layer) for layer in range(4)]
    tensors = [tensor for state in rank.states for tensor in state]
    assert sum(tensor.nbytes for tensor in tensors) == plan.memory.recurrent_state
    assert not any(tensor.any() for tensor in (*rank.pools, *tensors))
    assert param_bytes(rank.models) == plan.memory.weights, "caches are no weights"


def test_few_requests_have_eight_checkpoints_and_many_a_quarter() -> None:
    assert [default_checkpoints(count) for count in (1, 32, 33, 64)] == [8, 8, 9, 16]
    for slots in range(9, 200):
        most = most_requests(slots)
        assert most + default_checkpoints(most) <= slots < most + 1 + default_checkpoints(most + 1)


def test_states_are_kept_while_weights_are_exchanged(config: EngineConfig) -> None:
    plan = plan_rank(config, 0, "cpu")
    rank = load_rank(config, plan, lambda count: None)
    kept = KeptCaches(rank.backends, rank.pools, rank.states, rank.info, rank.allocated_before)
    again = reload_rank(config, plan, kept, lambda count: None)
    assert again.states is rank.states
    mixers = [layer.mixer for layer in again.models.target.layers]  # type: ignore[attr-defined]
    assert [mixers[layer].state is rank.states[layer] for layer in (0, 2)] == [True, True]


def test_inspect_shows_the_state_of_each_rank(config: EngineConfig) -> None:
    large = replace(
        config, dp_size=2, max_num_requests=2000, max_num_tokens=2000, num_state_checkpoints=30
    )
    lines = describe(large, "cpu").splitlines()
    line = next(line for line in lines if line.startswith("state "))
    assert line.split(maxsplit=1)[1] == (
        f"2 of 4 layers are recurrent: {SLOT:,} bytes a request, 2031 slots with the null one; "
        f"30 of them, {30 * SLOT:,} bytes, for the prefix cache"
    )
    head = next(index for index, line in enumerate(lines) if line.endswith("recurrent state"))
    due = f"{2031 * SLOT / 2**20:.1f}"
    assert [lines[head + 1 + rank].split()[::5] for rank in (0, 1)] == [["0", due], ["1", due]]


def test_a_model_without_recurrent_layers_says_nothing_of_states(tmp_path: Path) -> None:
    plain = EngineConfig(str(tiny_checkpoint(tmp_path)), max_model_len=256, device="cpu")
    plan = plan_rank(plain, 0, "cpu")
    assert (plan.slot_bytes, plan.memory.recurrent_state) == (0, 0)
    assert not plan.limits.keeps_state
    assert "recurrent" not in describe(plain, "cpu")
    assert "recurrent" not in memory_table([RankMemory(0, plan.memory)])


def test_states_that_leave_no_room_for_pages_are_named_with_what_fits(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = sketch_rank(config, 0, "cpu").memory
    states, sequence = use.recurrent_state, 17 * PAGE  # 256 tokens and the null page
    room = use.total - use.kv_cache + sequence - states
    whole = replace(config, kv_memory_fraction=1.0)
    for fit in (3, 1):
        memory = room + (fit + default_checkpoints(fit) + 1) * SLOT
        monkeypatch.setattr(memory_plan, "rank_memory", lambda *arguments, of=memory: of)
        with pytest.raises(ValueError, match="is not allowed; ") as error:
            plan_rank(whole, 0, "cpu")
        text = str(error.value)
        assert describe(whole, "cpu").splitlines()[-1] == f"does not fit: {text}"
        requests = int(re.findall(r"max_num_requests (\d+) fits", text)[0])
        assert requests >= fit
        plan_rank(replace(whole, max_num_requests=requests), 0, "cpu")


def test_states_that_exceed_the_memory_are_named_with_numbers(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = replace(config, max_num_requests=60_000, max_num_tokens=60_000)
    use = sketch_rank(many, 0, "cpu").memory
    memory = use.total - use.kv_cache - use.recurrent_state // 2
    monkeypatch.setattr(memory_plan, "rank_memory", lambda *arguments: memory)
    with pytest.raises(ValueError, match="before its first KV page") as error:
        plan_rank(many, 0, "cpu")
    text = str(error.value)
    size = f"{use.recurrent_state / 2**30:.2f} GiB"
    assert f"recurrent state {size} (75001 slots of {SLOT:,} bytes)" in text
    requests = int(re.findall(r"max_num_requests (\d+) fits", text)[0])
    assert 20_000 < requests < 60_000
    plan_rank(replace(many, max_num_requests=requests), 0, "cpu")


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_room_for_drafts_is_part_of_a_slot(tmp_path: Path, steps: int) -> None:
    """Their inputs of the convolution, and two gates of each head; the draft itself has pages."""
    model = add_mtp(qwen3_5_checkpoint(tmp_path))
    config = EngineConfig(
        str(model), max_model_len=256, page_size=16, max_num_requests=REQUESTS, max_num_tokens=64,
        device="cpu", launcher="thread", speculative_num_steps=steps,
    )  # fmt: skip
    plan = plan_rank(config, 0, "cpu")
    channels, heads, state = 2 * 2 * 16 + 4 * 24, 4, 4 * 16 * 24
    window, gates = channels * (3 + steps), steps * 2 * heads
    assert plan.slot_bytes == 3 * 4 * (window + gates + state), "of three layers"
    assert plan.memory.recurrent_state == (REQUESTS + 8 + 1) * plan.slot_bytes
    assert plan.page_bytes == (1 + (steps > 0)) * 2 * 2 * 16 * 32 * 4
    states = load_rank(config, plan, lambda count: None).states
    allocated = sum(tensor.nbytes for state in states for tensor in state)
    assert allocated == plan.memory.recurrent_state


def test_captured_pieces_keep_their_inputs(tmp_path: Path) -> None:
    model = qwen3_5_checkpoint(tmp_path)
    config = EngineConfig(
        str(model), max_num_tokens=64, max_model_len=256, device="cpu", launcher="thread"
    )
    plan = plan_rank(config, 0, "cpu")
    models = load_rank(config, plan, lambda count: None).models
    target, rows = models.target, 64
    inputs = PieceInputs.zeros(
        rows, target.hidden_size, False, target.backend.spec, target.delta_nets, torch.device("cpu")
    )
    net, head = target.delta_nets[0].shape, target.backend.spec
    floats = net.projected_size + net.v_size + 2 * head.num_heads * head.head_dim
    floats += target.hidden_size  # of embeddings
    assert param_bytes(inputs) == rows * (floats * 4 + 8 + 3 * 8 + 1 + 4)
    limits = replace(plan.limits, max_num_requests=0)
    kept = param_bytes(inputs) + target.forward_bytes(rows, rows, True)
    assert captured_bytes(models, limits, 1) >= kept


def test_a_layer_that_does_not_attend_has_no_pages_to_attend_to(config: EngineConfig) -> None:
    plan = plan_rank(config, 0, "cpu")
    backend = load_rank(config, plan, lambda count: None).backends[0]
    assert backend.device == torch.device("cpu")
    assert backend.layer(3).cache.layer == 3
    with pytest.raises(KeyError):
        backend.layer(2)


# A shape, ranks, GiB of a GPU; whether it fits with 64 requests a rank, and so many cached tokens;
# matrices that few rows are multiplied with by our kernel.
OUTPUT_35B, OUTPUT_397B = (2048, 4096), (4096, 8192)  # 397B's shared experts have 35B's, too
FITS = [
    ("qwen3.5-35b-a3b-fp8", 1, 79.1, 500_000, {(9216, 2048), (12352, 2048), OUTPUT_35B}),
    ("qwen3.5-122b-a10b-fp8", 4, 79.1, 500_000, set()),
    ("qwen3.5-397b-a17b-fp8", 4, 139.8, 100_000, {OUTPUT_397B, OUTPUT_35B}),
    ("qwen3.5-397b-a17b-fp8", 4, 79.1, None, {OUTPUT_397B, OUTPUT_35B}),
]


@pytest.mark.parametrize(("shape", "dp_size", "gib", "tokens", "few_rows"), FITS)
def test_what_fits_gpus(
    shape: str, dp_size: int, gib: float, tokens: int | None, few_rows: set[tuple[int, int]],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on_a_gpu(monkeypatch, gib)
    kernels = lambda *arguments: ("triton", "for the test")  # noqa: E731
    monkeypatch.setattr(rank_plan, "choose_moe_backend", kernels)
    model = write_shape(tmp_path, shape, mtp_layers=1)
    config = EngineConfig(
        str(model), load_format="dummy", dp_size=dp_size, device="cuda", max_model_len=16384,
        max_num_requests=64, max_num_tokens=8192, speculative_num_steps=3,
    )  # fmt: skip
    plan = sketch_rank(config, 0, "cuda:0")
    assert plan.graphs
    assert {(of.outputs, of.inputs) for of in plan.dense.few_rows_tiles} == few_rows
    assert plan.memory.recurrent_state == (64 + 16 + 1) * plan.slot_bytes
    assert plan.shortage.startswith("model: ") == (tokens is None)
    if tokens is not None:
        assert plan.shortage == ""
        assert plan.cache_tokens > tokens

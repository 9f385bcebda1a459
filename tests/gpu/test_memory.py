"""What GPU ranks were planned to use, and what they use, for layers of the Qwen3-30B-A3B shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.main import main
from dp_runtime.cli.reports import rank_memory
from dp_runtime.errors import StartError
from dp_runtime.startup.rank_plan import plan_rank
from tests.dp_runtime.startup.test_memory import MIB, QWEN3_30B_A3B
from tests.serving import check_pages_free

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four layers of the shape, with its whole vocabulary."""
    path = tmp_path_factory.mktemp("shape")
    (path / "config.json").write_text(json.dumps(QWEN3_30B_A3B | {"num_hidden_layers": 4}))
    return str(path)


def start(model: str, **fields: Any) -> Engine:
    fields = dict[str, Any](device="cuda", launcher="local", start_timeout_s=900.0) | fields
    return Engine(EngineConfig(model, load_format="dummy", max_model_len=4096, **fields))


def near(found: int, predicted: int) -> bool:
    """Within 10 % or 256 MB."""
    return abs(found - predicted) <= max(0.1 * predicted, 256e6)


def inspected_pages(model: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> list[int]:
    fixed = ["--model", model, "--load-format", "dummy", "--device", "cuda"]
    assert main(["inspect", *fixed, "--max-model-len", "4096", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if "KV pages" in line) + 1
    last = next(number for number, line in enumerate(lines) if line.startswith("memory in MiB"))
    return [int(line.split()[3]) for line in lines[first:last]]


CASES: list[tuple[int, str, dict[str, Any]]] = [
    (1, "ep", {}),
    (1, "tp", {"max_num_requests": 256, "max_num_tokens": 8192}),
    (1, "ep", {"num_pages": 300, "attention_backend": "flashinfer"}),
    (2, "ep", {}),
    (2, "tp", {}),
    (2, "tp", {"padding": "ragged", "max_num_tokens": 4096}),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("dp_size", "sharding", "fields"), CASES)
def test_a_rank_uses_what_was_predicted(
    model: str, dp_size: int, sharding: str, fields: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if torch.cuda.device_count() < dp_size:
        pytest.skip(f"{dp_size} GPUs are needed, {torch.cuda.device_count()} are here")
    fields = {"dp_size": dp_size, "moe_sharding": sharding} | fields
    flags = [word for name, value in fields.items()
             for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    pages = inspected_pages(model, flags, capsys)
    with start(model, **fields) as engine:
        params = SamplingParams(max_tokens=8, ignore_eos=True, prompt_logprobs=1)
        engine.generate([list(range(n, n + 500)) for n in range(8)], params)
        check_pages_free(engine)
        ranks = engine.health()
    with capsys.disabled():
        print("\n" + rank_memory(ranks))
    assert [rank.num_pages for rank in ranks] == pages
    for rank in ranks:
        assert rank.memory is not None
        predicted, found = rank.memory.predicted, rank.memory.measured
        assert found is not None
        assert found.weights == pytest.approx(predicted.weights, rel=0.01)
        assert near(found.workspaces, predicted.workspaces)
        assert near(found.activations, predicted.activations)
        assert predicted.kv_cache == rank.num_pages * 64 * 2 * 4 * 4 * 128 * 2
        assert found.kv_cache == pytest.approx(predicted.kv_cache, abs=4 * 2 * MIB)


@pytest.mark.timeout(300)
def test_memory_that_others_hold_is_a_start_error(model: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    foreign = torch.empty(free - (4 << 30), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(StartError) as error:
            start(model)
    finally:
        del foreign
        torch.cuda.empty_cache()
    text = str(error.value)
    assert "rank 0: cuda:0 has " in text
    assert "KV pages" in text
    assert "end other processes on this GPU, or lower kv_memory_fraction or num_pages" in text
    assert "\n" not in text


def test_a_pool_below_what_is_left_still_starts_beside_others(model: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    foreign = torch.empty(free - (16 << 30), dtype=torch.uint8, device="cuda")
    try:
        with start(model, num_pages=200) as engine:
            assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))[0].token_ids
    finally:
        del foreign
        torch.cuda.empty_cache()


CONTEXT = """
import ctypes, sys
from dp_runtime.cli.main import main
main(["inspect", *sys.argv[1:]])
cuda = ctypes.CDLL("libcuda.so.1")
device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
assert cuda.cuInit(0) == 0
assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuDevicePrimaryCtxGetState(
    device, ctypes.byref(flags), ctypes.byref(active)
) == 0
print("active contexts:", active.value)
"""


def test_inspect_creates_no_context(model: str) -> None:
    arguments = [sys.executable, "-c", CONTEXT, "--model", model, "--device", "cuda"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "active contexts: 0" in done.stdout


@pytest.mark.timeout(300)
def test_the_plan_does_not_depend_on_what_is_free(model: str) -> None:
    config = EngineConfig(model, load_format="dummy", device="cuda", max_model_len=4096)
    before = plan_rank(config, 0, "cuda:0")
    foreign = torch.empty(8 << 30, dtype=torch.uint8, device="cuda")
    assert plan_rank(config, 0, "cuda:0") == before
    del foreign
    torch.cuda.empty_cache()

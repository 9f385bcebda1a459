"""KV caches in e4m3: through an engine on CPU ranks, with scales of the checkpoint or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.startup.build_rank import read_kv_scales
from dp_runtime.startup.rank_plan import plan_rank
from dp_runtime.weights.loader import open_weights
from tests.checkpoints import tiny_checkpoint
from tests.dp_runtime.paged import CPU, attend, metadata_of, paged_batch, random_page_table

K_SCALES, V_SCALES = (0.013, 0.5), (0.021, 0.25)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0 in the form of the attention module, layer 1 in that of its projections."""
    path = tiny_checkpoint(tmp_path_factory.mktemp("scaled"))
    tensors = load_file(path / "model.safetensors")
    first, second = (f"model.layers.{layer}.self_attn" for layer in (0, 1))
    tensors[f"{first}.k_scale"] = torch.tensor(K_SCALES[0])
    tensors[f"{first}.v_scale"] = torch.tensor([V_SCALES[0]])
    tensors[f"{second}.k_proj.k_scale"] = torch.tensor(K_SCALES[1])
    tensors[f"{second}.v_proj.v_scale"] = torch.tensor(V_SCALES[1])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def read_scales(path: Path, kv_cache_dtype: str = "fp8_e4m3") -> list[KvScales]:
    config = EngineConfig(str(path), kv_cache_dtype=kv_cache_dtype)
    weights = open_weights(str(path), "safetensors", 0, torch.float32, CPU)
    return read_kv_scales(weights, plan_rank(config, 0, "cpu"))


def test_scales_are_read_in_both_forms(plain: Path, scaled: Path) -> None:
    assert read_scales(plain) == [KvScales(1.0, 1.0)] * 2
    found = [(scale.k, scale.v) for scale in read_scales(scaled)]
    assert found == [pytest.approx(pair) for pair in zip(K_SCALES, V_SCALES)]
    assert read_scales(scaled, "auto") == [KvScales()] * 2


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_no_positive_number_is_named(tmp_path: Path, value: float) -> None:
    path = tiny_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_scale"] = torch.tensor(value)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_scale: .* is not allow"):
        read_scales(path)


def test_a_page_takes_a_quarter_of_float32(plain: Path) -> None:
    full, small = (
        plan_rank(EngineConfig(str(plain), kv_cache_dtype=kind), 0, "cpu").page_bytes
        for kind in ("auto", "fp8_e4m3")
    )
    assert small * 4 == full


def logprobs(
    model: Path, prompts: list[list[int]], tokens: int, **fields: Any
) -> list[RequestOutput]:
    config = EngineConfig(str(model), launcher="thread", max_model_len=128, **fields)
    with Engine(config) as engine:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, prompt_logprobs=0)
        return engine.generate(prompts, params)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_log_probabilities_are_near_those_of_a_full_cache(scaled: Path, dp_size: int) -> None:
    """Prompts in chunks, so that most rows attend to quantised pages."""
    prompts = [[(7 * i + 3 * j) % 199 for j in range(n)] for i, n in enumerate((40, 33, 64, 5))]
    fields: dict[str, Any] = {"dp_size": dp_size, "max_num_tokens": 16, "max_num_requests": 4}
    full, small = (
        logprobs(scaled, prompts, 1, kv_cache_dtype=kind, check_device_values=True, **fields)
        for kind in ("auto", "fp8_e4m3")
    )
    pairs = [
        (one.logprob, other.logprob)
        for a, b in zip(full, small)
        for one, other in zip(a.prompt_logprobs or (), b.prompt_logprobs or (), strict=True)
    ]
    one, other = torch.tensor(pairs).unbind(1)
    assert len(pairs) == sum(len(prompt) - 1 for prompt in prompts)
    difference = (one - other).abs().median()  # NOTE: not the mean; a router may choose otherwise
    assert 1e-3 < difference < 0.1


def test_values_come_back_times_their_scale() -> None:
    table, num_pages = random_page_table([8], 4, np.random.default_rng(0))
    metadata = metadata_of(paged_batch([(8, 8)], table, 4), num_pages, 4)
    spec = AttentionSpec(1, 1, 8, 4, torch.float32, torch.float8_e4m3fn)
    pool = torch.zeros(num_pages, 2, 1, 4, 8, dtype=torch.float8_e4m3fn)
    backend = TorchRefBackend(spec, [pool], [KvScales(k=0.5, v=0.25)])
    values = 0.25 * torch.arange(8.0).view(8, 1, 1).expand(8, 1, 8)  # e4m3 has them, times 4
    out = attend(backend, torch.zeros(8, 1, 8), torch.ones(8, 1, 8), values, metadata)
    means = 0.25 * torch.tensor([row / 2 for row in range(8)]).view(8, 1, 1)
    torch.testing.assert_close(out, means.expand(8, 1, 8))
    assert pool.float().max() == 7.0

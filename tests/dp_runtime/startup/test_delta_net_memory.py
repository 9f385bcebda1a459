"""What the Qwen3.5 MoE family is predicted to take, against what its tensors take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dp_runtime.live_bytes import attend_frugally, exchange_in_step
from tests.dp_runtime.startup.test_memory import MIB, Ready, on_ranks, predicted_and_live
from tests.test_bytes_read import storage_bytes, weights_in

SMALL: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text",
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 60, "shared_expert_intermediate_size": 60, "vocab_size": 500,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "max_position_embeddings": 4096, "eos_token_id": 0,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
ATTENTION = {"layer_types": ["full_attention"] * 2, "num_attention_heads": 16}
CASES: dict[str, tuple[dict[str, Any], float, dict[str, Any]]] = {  # the factor that is not passed
    "delta nets": ({}, 1.5, {}),
    "delta nets in bf16": ({}, 1.6, {"dtype": "bfloat16", "dp_size": 2}),
    "gated attention": (ATTENTION, 1.15, {}),
    "gated attention in bf16": (ATTENTION, 1.15, {"dtype": "bfloat16", "dp_size": 2}),
    "shared experts": (
        {"shared_expert_intermediate_size": 1500, "layer_types": ["full_attention"] * 2}, 1.1, {}
    ),
}  # fmt: skip


def directory(path: Path, **changes: Any) -> str:
    (path / "config.json").write_text(json.dumps(SMALL | changes))
    return str(path)


@pytest.mark.parametrize("name", CASES)
def test_activations_are_predicted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, most, fields = CASES[name]
    attend_frugally(monkeypatch)
    exchange_in_step(monkeypatch)
    limits = {"max_num_tokens": 512, "max_num_requests": 8, "max_model_len": 600}
    model = directory(tmp_path, **changes)
    for predicted, live in on_ranks(model, predicted_and_live, **limits, **fields):
        print(f"{name}: predicted {predicted / MIB:.2f} MiB, live {live / MIB:.2f} MiB")
        assert live > 4 * MIB
        assert 0.95 * live < predicted < most * live


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_predicted_exactly_and_states_are_none(tmp_path: Path, dtype: str) -> None:
    def held(ready: Ready) -> tuple[int, int, int]:
        plan, states = ready.plan, ready.loaded.states
        kept = storage_bytes([tensor for state in states for tensor in state])
        assert kept == plan.slot_bytes * plan.limits.num_state_slots
        return plan.memory.weights, storage_bytes(weights_in(ready.loaded.models)), kept

    for predicted, found, kept in on_ranks(directory(tmp_path), held, dp_size=2, dtype=dtype):
        assert predicted == found - kept

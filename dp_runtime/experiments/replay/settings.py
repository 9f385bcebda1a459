"""Which settings a replay may change, and what changes with them."""

from __future__ import annotations

SAME_ROWS = ("padding",)  # leave each step the rows that it had
REROUTES = ("routing", "dp_size")
SCHEDULES = ("prefill_budget", "max_step_ms", "max_num_requests", "max_num_tokens")
CHANGES = (*SAME_ROWS, *REROUTES, *SCHEDULES)
PLACES = ("device", "launcher", "model")  # where it is replayed
ON_DEVICE = (
    "moe_sharding", "moe_backend", "attention_backend", "collective", "cuda_graphs", "overlap",
)  # fmt: skip

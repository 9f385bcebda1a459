"""How long a lost rank is felt: ranks are killed, or stopped, again and again under load.

    python -m examples.benchmarks.recovery --model examples/tiny_moe/checkpoint --device cpu

With `--standby-ranks` each fault comes once all standbys are warm.
Prints, as p50 and p99 over the faults, seconds from the signal until the fault is noticed, until
all ranks step again, until the first next token of a request of another rank and of the lost one's,
which is replayed, and until tokens come at 95 % of the rate before the fault. Then what other ranks
kept: KV pages in use before the fault and right after. `--compare` lets requests run to their end
and compares their texts with undisturbed runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any

import numpy as np

from dp_runtime import Engine, RequestHandle, SamplingParams
from dp_runtime.metrics.status import RankHealth
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import add_flags, config_from, new_parser
from examples.benchmarks.harness.same_texts import Difference, differences, scored

LOOK_S = 0.002
BEFORE_S = 2.0  # of undisturbed decoding, whose second half is the rate to come back to
RATE_S = 0.5  # in which tokens are counted
FULL_RATE = 0.95
GIVE_UP_S = 180.0
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True)
class Felt:
    """What one fault did."""

    seconds: dict[str, float]
    pages_before: int  # in use on the ranks that were not lost
    pages_after: int
    replayed: int
    different: Sequence[Difference] | None


def main() -> None:
    args = parse_args()
    print(machine.describe("torch"), f"; load {os.getloadavg()[0]:.1f}")
    given: dict[str, Any] = {"max_recoveries": 10_000}
    with TemporaryDirectory() as dumps:
        config, draw = config_from(args, flight_dump_dir=dumps, **given), random.Random(args.seed)
        with Engine(config) as engine:
            bench = Bench(engine, args, draw)
            kinds = list(islice(cycle(args.kind), args.faults))
            felt = [bench.measure_one(kind) for kind in kinds]
    for kind in args.kind:
        print(f"{kind}:")
        report([one for one, sent in zip(felt, kinds) if sent == kind])


def report(felt: Sequence[Felt]) -> None:
    for name in felt[0].seconds:
        seconds = [one.seconds[name] for one in felt]
        p50, p99 = np.percentile(seconds, [50, 99])
        print(f"{name:<28} p50 {p50:6.2f} s  p99 {p99:6.2f} s  max {max(seconds):6.2f} s")
    for one in felt:
        print(
            f"pages in use on other ranks {one.pages_before}, then {one.pages_after}; "
            f"{one.replayed} requests replayed, none lost"
        )
        if one.different is not None:
            gaps = [f"{difference.gap:.4f}" for difference in one.different]
            print(f"{len(gaps)} texts went another way; log probability gaps there: {gaps}")


class Bench:
    """Serves the same requests again and again, and sends signals to ranks meanwhile."""

    def __init__(self, engine: Engine, args: argparse.Namespace, draw: random.Random) -> None:
        self._engine, self._args, self._draw = engine, args, draw
        self._group: Any = engine._core._group
        size = (args.requests, args.prompt_tokens)
        ids = np.random.default_rng(args.seed).integers(3, args.max_token_id, size)
        self._prompts: list[list[int]] = ids.tolist()
        self._params = SamplingParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
        self._undisturbed = None
        if args.compare:
            self._undisturbed = scored(engine, self._prompts, self._params)
            again = scored(engine, self._prompts, self._params)
            gaps = [f"{one.gap:.4f}" for one in differences(self._undisturbed, again)]
            print(f"undisturbed twice: {len(gaps)} of {args.requests} texts differ, gaps {gaps}")

    def measure_one(self, kind: str) -> Felt:
        """Decode, send a signal to one rank, and wait until requests of all have new tokens."""
        supervisor, config = self._group._supervisor, self._engine.config
        wait_for(lambda: self._group.standbys.num_warm == config.standby_ranks)
        handles = [
            self._engine.submit(prompt, self._params, n % config.dp_size)
            for n, prompt in enumerate(self._prompts)
        ]
        wait_for(lambda: all(handle.arrivals for handle in handles))
        sleep(BEFORE_S + self._draw.random() / 2)
        ranks = self._engine.health()
        victim = self._draw.choice(ranks)
        assert not any(handle.done for handle in handles), "requests end early: raise --tokens"
        epoch, started = supervisor.state.epoch, monotonic()
        os.kill(victim.pid, SIGNALS[kind])
        wait_for(lambda: supervisor.state.recovering or supervisor.state.epoch > epoch)
        noticed = monotonic()
        wait_for(lambda: supervisor.state.epoch > epoch)
        begun = monotonic()
        pages_after = pages_in_use(self._engine.health(), victim.dp_rank)
        lost = handles[victim.dp_rank :: config.dp_size]
        kept = [handle for handle in handles if handle not in lost]
        replayed, survived = first_after(begun, lost), first_after(begun, kept)
        rate = tokens_between(handles, started - BEFORE_S / 2, started) / (BEFORE_S / 2)
        sleep(self._args.settle_s)  # who counted meanwhile would slow the engine down
        back = full_rate(handles, begun, FULL_RATE * rate)
        different = self._end(handles)
        seconds = {
            "noticed": noticed - started,
            "all ranks step again": begun - started,
            "next token, other ranks": survived - started,
            "next token, replayed": replayed - started,
            "95 % of the rate before": back - started,
        }
        print(
            json.dumps(seconds | {"kind": kind, "rank": victim.dp_rank, "rate_before": rate}),
            flush=True,
        )
        before = pages_in_use(ranks, victim.dp_rank)
        return Felt(seconds, before, pages_after, len(lost), different)

    def _end(self, handles: Sequence[RequestHandle]) -> Sequence[Difference] | None:
        if self._undisturbed is None:
            for handle in handles:
                handle.abort()
        outputs = [handle.result(GIVE_UP_S) for handle in handles]
        assert all(output.finish_reason for output in outputs)
        return None if self._undisturbed is None else differences(self._undisturbed, outputs)


def pages_in_use(ranks: Sequence[RankHealth], but: int) -> int:
    return sum(rank.num_pages - 1 - rank.free_pages for rank in ranks if rank.dp_rank != but)


def first_after(moment: float, handles: Sequence[RequestHandle]) -> float:
    """The time of the first token after a moment."""
    found: list[float] = []

    def look() -> bool:
        found[:] = [at for one in handles for at, _ in one.arrivals[-200:] if at > moment]
        return bool(found)

    wait_for(look)
    return min(found)


def tokens_between(handles: Sequence[RequestHandle], start: float, end: float) -> int:
    return sum(count for one in handles for at, count in one.arrivals if start <= at < end)


def full_rate(handles: Sequence[RequestHandle], begun: float, rate: float) -> float:
    """The first moment from which tokens came at this rate for RATE_S; inf if they have not yet."""
    arrivals = [arrival for one in handles for arrival in one.arrivals if arrival[0] > begun]
    times, counts = np.array(sorted(arrivals)).T
    sums = np.concatenate(([0], counts.cumsum()))
    moments = np.arange(begun, times[-1] - RATE_S, RATE_S / 10)
    came = sums[times.searchsorted(moments + RATE_S)] - sums[times.searchsorted(moments)]
    back = moments[came >= rate * RATE_S]
    return float(back[0]) if len(back) else float("inf")


def wait_for(ok: Callable[[], bool]) -> None:
    deadline = monotonic() + GIVE_UP_S
    while not ok():
        assert monotonic() < deadline, f"nothing after {GIVE_UP_S:g} s"
        sleep(LOOK_S)


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "model", "dp_size", "collective", device="cuda", overlap=None)
    parser.add_argument("--launcher", choices=["local", "ray"], default="local")
    parser.add_argument("--load-format", default="safetensors")
    parser.add_argument("--log-level", default="error")
    parser.add_argument(
        "--kind", choices=list(SIGNALS), nargs="+", default=["kill"], help="in turn"
    )
    parser.add_argument("--standby-ranks", type=int, default=0)
    parser.add_argument("--host-weights", action="store_true")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--max-token-id", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1500, help="of a request, to outlast a fault")
    parser.add_argument("--settle-s", type=float, default=3.0, help="for the rate to come back")
    parser.add_argument("--compare", action="store_true", help="texts with undisturbed runs")
    parser.add_argument("--max-num-requests", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--start-timeout-s", type=float, default=600.0)
    parser.add_argument("--torch-threads", type=int)
    parser.add_argument("--hang-timeout-s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()

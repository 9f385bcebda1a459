"""How long a lost rank is felt: ranks are killed, or stopped, again and again under load.

    python -m examples.benchmarks.recovery --model examples/tiny_moe/checkpoint --device cpu

With `--standby-ranks` each fault comes once all standbys are warm.
Prints, as p50 and p99 over the faults, seconds from the signal until the fault is noticed, until
all ranks step again, and until the first next token of a request of another rank and of the lost
one's, which is replayed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any

import numpy as np

from dp_runtime import Engine, RequestHandle, SamplingParams
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import add_flags, config_from, new_parser

LOOK_S = 0.002
BEFORE_S = 0.5  # of undisturbed decoding
GIVE_UP_S = 120.0
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def main() -> None:
    args = parse_args()
    print(machine.describe("torch"), f"; load {os.getloadavg()[0]:.1f}")
    given: dict[str, Any] = {"max_recoveries": 10_000, "log_level": "error"}
    with TemporaryDirectory() as dumps:
        config, draw = config_from(args, flight_dump_dir=dumps, **given), random.Random(args.seed)
        with Engine(config) as engine:
            measured = [measure_one(engine, args, draw) for _ in range(args.faults)]
    for name in measured[0]:
        seconds = [one[name] for one in measured]
        p50, p99 = np.percentile(seconds, [50, 99])
        print(f"{name:<28} p50 {p50:6.2f} s  p99 {p99:6.2f} s  max {max(seconds):6.2f} s")


def measure_one(engine: Engine, args: argparse.Namespace, draw: random.Random) -> dict[str, float]:
    """Decode, send a signal to one rank, and wait until requests of all ranks have new tokens."""
    group: Any = engine._core._group
    supervisor, standbys = group._supervisor, group.standbys
    wait_for(lambda: standbys.num_warm == engine.config.standby_ranks)
    endless = SamplingParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
    size = engine.config.dp_size
    prompts = [[draw.randrange(3, 100) for _ in range(8)] for _ in range(args.requests)]
    handles = [engine.submit(one, endless, n % size) for n, one in enumerate(prompts)]
    sleep(BEFORE_S + draw.random() / 2)
    victim = draw.choice(engine.health())
    assert not any(handle.done for handle in handles), "requests end early: raise --tokens"
    epoch, started = supervisor.state.epoch, monotonic()
    os.kill(victim.pid, SIGNALS[args.kind])
    wait_for(lambda: supervisor.state.recovering or supervisor.state.epoch > epoch)
    noticed = monotonic()
    wait_for(lambda: supervisor.state.epoch > epoch)
    begun = monotonic()
    lost = handles[victim.dp_rank :: size]
    kept = [handle for handle in handles if handle not in lost]
    replayed, survived = first_after(begun, lost), first_after(begun, kept)
    for handle in handles:
        handle.abort()
    assert all(handle.result(GIVE_UP_S).finish_reason for handle in handles)
    return {
        "noticed": noticed - started,
        "all ranks step again": begun - started,
        "next token, other ranks": survived - started,
        "next token, replayed": replayed - started,
    }


def first_after(moment: float, handles: Sequence[RequestHandle]) -> float:
    """The time of the first token after a moment."""
    found: list[float] = []

    def look() -> bool:
        found[:] = [at for one in handles for at, _ in one.arrivals[-200:] if at > moment]
        return bool(found)

    wait_for(look)
    return min(found)


def wait_for(ok: Callable[[], bool]) -> None:
    deadline = monotonic() + GIVE_UP_S
    while not ok():
        assert monotonic() < deadline, f"nothing after {GIVE_UP_S:g} s"
        sleep(LOOK_S)


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "model", "dp_size", "collective", device="cuda", overlap=None)
    parser.add_argument("--launcher", choices=["local", "ray"], default="local")
    parser.add_argument("--kind", choices=list(SIGNALS), default="kill")
    parser.add_argument("--standby-ranks", type=int, default=0)
    parser.add_argument("--host-weights", action="store_true")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1500, help="of a request, to outlast a fault")
    parser.add_argument("--max-num-requests", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--torch-threads", type=int)
    parser.add_argument("--hang-timeout-s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()

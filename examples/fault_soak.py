"""A soak with faults: ranks die, hang, leave and come under load, and no token may change.

    python -m examples.fault_soak --minutes 20

First every request of a small set runs undisturbed. Then so many are kept in flight, some are
aborted, and every few seconds something happens to the ranks: one is killed, stopped, or stopped
and continued; the engine is resized, or a rank is drained. The exit status is 1, with the reasons,
if a request fails or has other tokens than undisturbed, or if pages, processes, shared memory,
threads, open files or memory grow.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import monotonic, sleep

import psutil

from dp_runtime import Engine, EngineConfig, RequestHandle, SamplingParams
from dp_runtime.errors import ResizeFailed
from examples.soak_checks import wait_for_pages

TINY_MODEL = Path(__file__).parent / "tiny_moe" / "checkpoint"
POLL_S = 0.005
SAMPLE_S = 10.0
WAIT_S = 120.0
GROWTH = 1.10  # of what should be flat, from the second quarter to the last
SIZES = (2, 3, 4, 5)
NUM_PROMPTS = 120
ABORTED = 0.002  # the chance of an abort at each look


@dataclass(frozen=True)
class Wanted:
    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: tuple[int, ...]  # of the undisturbed run


@dataclass
class Counts:
    """What was served, and what was wrong."""

    ended: int = 0
    aborted: int = 0
    wrong: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Use:
    """What the driver and its ranks hold at a moment."""

    driver_mib: float
    rank_mib: float  # the mean of all ranks
    threads: int
    files: int
    shared_memory: int

    @classmethod
    def now(cls) -> Use:
        driver, ranks = psutil.Process(), []
        for child in driver.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.name().startswith("dp-rank"):
                    ranks.append(child.memory_info().rss)
        mean = sum(ranks) / max(len(ranks), 1)
        held = len(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else 0
        return cls(
            driver.memory_info().rss / 2**20, mean / 2**20,
            driver.num_threads(), driver.num_fds(), held,
        )  # fmt: skip


class Chaos:
    """Does something to the ranks every few seconds, in a thread of its own."""

    def __init__(self, engine: Engine, counts: Counts, draw: random.Random, every_s: float) -> None:
        self._engine, self._counts, self._draw = engine, counts, draw
        self._every_s, self._over = every_s, Event()
        self._acts: dict[str, Callable[[], object]] = {
            "kill": lambda: self._signal(signal.SIGKILL),
            "stop": lambda: self._signal(signal.SIGSTOP),
            "stop and continue": self._stop_and_continue,
            "resize": lambda: self._engine.resize(self._draw.choice(SIZES)),
            "drain": self._drain,
        }
        self._thread = Thread(target=self._run, name="chaos", daemon=True)
        self._thread.start()

    def end(self) -> None:
        assert self._thread.is_alive(), "what it raised is on stderr"
        self._over.set()
        self._thread.join(WAIT_S)
        self._engine.resize(4)

    def _run(self) -> None:
        while not self._over.wait(self._draw.uniform(0.3, 2 * self._every_s)):
            name = self._draw.choice(sorted(self._acts))
            try:
                self._acts[name]()
            except ResizeFailed as error:  # a fault came between
                name = f"{name} refused"
                print(f"{name}: {error}", file=sys.stderr)
            self._counts.happened[name] += 1

    def _signal(self, number: signal.Signals) -> list[int]:
        """Send a signal to a rank that answers, if any does just now."""
        pids = [rank.pid for rank in self._engine.health() if rank.pid]
        chosen = self._draw.sample(pids, min(1, len(pids)))
        _send(chosen, number)
        return chosen

    def _stop_and_continue(self) -> None:
        chosen = self._signal(signal.SIGSTOP)
        sleep(self._draw.uniform(0.2, 4.0))
        _send(chosen, signal.SIGCONT)

    def _drain(self) -> None:
        if len(self._engine.dp_ranks) > min(SIZES):
            self._engine.drain(self._draw.choice(self._engine.dp_ranks), 0.5)


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def undisturbed(engine: Engine, draw: random.Random) -> list[Wanted]:
    """Serve some requests, greedy and drawn, for the tokens that they should have."""
    prompts = [
        [draw.randrange(3, 1000) for _ in range(draw.randrange(1, 80))] for _ in range(NUM_PROMPTS)
    ]
    params = [
        SamplingParams(
            max_tokens=draw.randrange(8, 120), ignore_eos=True, seed=n, temperature=0.8 * (n % 2)
        )
        for n in range(NUM_PROMPTS)
    ]
    outputs = engine.generate(prompts, params)
    return [
        Wanted(tuple(prompt), own, output.token_ids)
        for prompt, own, output in zip(prompts, params, outputs, strict=True)
    ]


def serve(
    engine: Engine, wanted: Sequence[Wanted], counts: Counts, args: argparse.Namespace
) -> list[Use]:
    """Keep requests in flight until the time is over; returns what was held meanwhile."""
    draw, live, uses = random.Random(args.seed + 1), dict[RequestHandle, Wanted](), list[Use]()
    until, next_sample = monotonic() + 60 * args.minutes, monotonic()
    while monotonic() < until or live:
        while len(live) < args.in_flight and monotonic() < until:
            one = draw.choice(wanted)
            live[engine.submit(one.prompt, one.params)] = one
        if live and draw.random() < ABORTED:
            draw.choice(list(live)).abort()
        for handle in [handle for handle in live if handle.done]:
            check(handle, live.pop(handle), counts)
        if monotonic() >= next_sample:
            next_sample += SAMPLE_S
            uses.append(Use.now())
            print(f"{counts.ended} ended, ranks {engine.dp_ranks}, {uses[-1]}", flush=True)
        sleep(POLL_S)
        assert monotonic() < until + WAIT_S, f"{len(live)} requests do not end"
    return uses


def check(handle: RequestHandle, wanted: Wanted, counts: Counts) -> None:
    """Compare a request with its undisturbed run, of which an aborted one has the beginning."""
    try:
        output = handle.result(0)
    except Exception as error:
        counts.wrong.append(f"request {handle.request_id}: {error}")
        return
    aborted = output.finish_reason == "abort"
    counts.aborted += aborted
    counts.ended += 1
    due = wanted.tokens[: len(output.token_ids)] if aborted else wanted.tokens
    if output.token_ids != due:
        counts.wrong.append(f"request {handle.request_id}: {output.token_ids}, not {due}")


def grown(uses: Sequence[Use], before: Use, after: Use) -> list[str]:
    """Name what grew: memory while it served; what goes by the number of ranks, in all."""
    quarter, found = max(len(uses) // 4, 1), []
    for name in vars(before):
        first, last = getattr(before, name), getattr(after, name)
        if name.endswith("_mib"):
            values = [getattr(use, name) for use in uses]
            first = sum(values[quarter : 2 * quarter] or values[:1]) / quarter
            last = sum(values[-quarter:]) / quarter
        print(f"{name:<14} {first:8.1f} -> {last:8.1f}")
        if last > GROWTH * first + 2:
            found.append(f"{name} grew from {first:.1f} to {last:.1f}")
    return found


def leaks(engine: Engine) -> list[str]:
    """Name pages that are not free once all requests have ended."""
    return [
        f"rank {rank.dp_rank} has {rank.free_pages} of {rank.num_pages}"
        for rank in wait_for_pages(engine)
        if rank.free_pages != rank.num_pages - 1
    ]


def main() -> None:
    args = parse_args()
    counts, draw = Counts(), random.Random(args.seed)
    with TemporaryDirectory() as dumps:
        config = EngineConfig(
            str(args.model), dp_size=4, launcher=args.launcher, device="cpu", torch_threads=1,
            max_model_len=256, hang_timeout_s=2.0, max_recoveries=10_000, flight_dump_dir=dumps,
            log_level="error", speculative_num_steps=args.speculative_num_steps,
            standby_ranks=args.standby_ranks,
        )  # fmt: skip
        with Engine(config) as engine:
            wanted = undisturbed(engine, draw)
            before, chaos = Use.now(), Chaos(engine, counts, draw, args.every_s)
            uses = serve(engine, wanted, counts, args)
            chaos.end()
            faults = counts.wrong + leaks(engine) + grown(uses, before, Use.now())
    happened = ", ".join(f"{count} {name}" for name, count in sorted(counts.happened.items()))
    print(f"{counts.ended} requests ended, {counts.aborted} of them aborted; {happened}")
    print("\n".join(f"FAULT: {fault}" for fault in faults) or "no faults")
    sys.exit(bool(faults))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=TINY_MODEL)
    parser.add_argument("--launcher", choices=["local", "ray"], default="local")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every-s", type=float, default=5.0, help="mean time between faults")
    parser.add_argument("--in-flight", type=int, default=48)
    parser.add_argument("--speculative-num-steps", type=int, default=0)
    parser.add_argument("--standby-ranks", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()

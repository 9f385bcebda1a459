"""Ends a bench job in mid-run, and checks that no actor, GPU memory or shared memory is left.

    python examples/nvl4/job_stop.py --cluster HOST:PORT --dashboard URL -- --dp-size 4 ...

What follows `--` goes to `launch.py bench`. With a dashboard the bench is a job: `ray job submit`,
then `ray job stop`. Without one (the packages of ray[default] are missing) the same driver runs as
a plain process on the cluster and is ended by SIGTERM. Prints a log with seconds; the exit status
is 1, with what is left, if something is.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Protocol

import psutil

REPOSITORY = Path(__file__).parents[2]
BENCH = (
    "launch.py", "bench", "--num-requests", "20000", "--input-len", "16", "64",
    "--output-len", "128", "512",
)  # fmt: skip
SERVING = re.compile(r"generate: [1-9]\d* of \d+ requests")
START_S, END_S = 900.0, 60.0
MEMORY_SLACK_MIB = 8  # the driver's own bookkeeping
JOB = "long-bench"
HIDDEN = '{"excludes": ["/.*/"]}'  # what a job does not upload


@dataclass(frozen=True)
class Traces:
    """What ranks of this machine occupy."""

    ranks: frozenset[int]  # pids
    gpu_mib: tuple[int, ...]  # [GPU]
    shared: frozenset[str]  # names in /dev/shm

    def __str__(self) -> str:
        return (
            f"{len(self.ranks)} ranks, GPU MiB {list(self.gpu_mib)}, {len(self.shared)} shm names"
        )


def look() -> Traces:
    """The traces of ranks now; Ray actors and local processes alike."""
    ranks = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = process.info["cmdline"] or [""]
        if words[0].startswith("ray::Rank") or "workers.local_rank" in words:
            ranks.add(process.info["pid"])
    names = frozenset(path.name for path in Path("/dev/shm").glob("dp-runtime-*"))
    return Traces(frozenset(ranks), gpu_memory(), names)


def gpu_memory() -> tuple[int, ...]:
    """MiB in use on every GPU, as nvidia-smi counts them; none without it."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    return tuple(int(line) for line in done.stdout.split())


def left_of(before: Traces, after: Traces) -> list[str]:
    """What is there now and was not before."""
    left = [f"rank process {pid}" for pid in sorted(after.ranks - before.ranks)]
    left += [f"/dev/shm/{name}" for name in sorted(after.shared - before.shared)]
    for gpu, (old, new) in enumerate(zip(before.gpu_mib, after.gpu_mib, strict=True)):
        if new > old + MEMORY_SLACK_MIB:
            left.append(f"{new - old} MiB on GPU {gpu}")
    return left


class Bench(Protocol):
    """A bench that runs, whoever started it."""

    def output(self) -> str:
        """What it has printed so far."""

    def ended(self) -> bool:
        """It has ended, by itself or because it was stopped."""

    def stop(self) -> None:
        """Ask it to end."""


class JobBench:
    """The bench as a job of Ray's job server."""

    def __init__(self, dashboard: str, flags: list[str]) -> None:
        self._address = ["--address", dashboard]
        options = ["--no-wait", "--submission-id", JOB, "--working-dir", str(REPOSITORY)]
        self._ray("submit", *options, "--runtime-env-json", HIDDEN, "--", "python", *BENCH, *flags)

    def output(self) -> str:
        return self._ray("logs", JOB)

    def ended(self) -> bool:
        status = self._ray("status", JOB)
        return not any(word in status for word in ("PENDING", "RUNNING"))

    def stop(self) -> None:
        say(self._ray("stop", JOB).strip().splitlines()[-1])

    def _ray(self, verb: str, *arguments: str) -> str:
        command = ["ray", "job", verb, *self._address, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout + done.stderr


class ProcessBench:
    """The same driver as a process of ours on the cluster."""

    def __init__(self, cluster: str, flags: list[str], log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, *BENCH, "--ray-address", cluster, *flags],
            cwd=REPOSITORY,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def output(self) -> str:
        return self._log.read_text()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        self._process.terminate()


STARTED = monotonic()


def say(text: str) -> None:
    print(f"{monotonic() - STARTED:7.1f} s  {text}", flush=True)


def wait_until(ok: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it became true in time."""
    deadline = monotonic() + timeout_s
    while not ok():
        if monotonic() > deadline:
            return False
        sleep(0.5)
    return True


def stop_in_mid_run(bench: Bench, dp_size: int, before: Traces) -> list[str]:
    """Wait until it serves, stop it, and return what is wrong then."""
    serving = wait_until(lambda: bool(SERVING.search(bench.output())) or bench.ended(), START_S)
    during = look()
    say(f"in mid-run: {during}")
    if not serving or bench.ended() or len(during.ranks - before.ranks) != dp_size:
        return [f"the bench does not serve on {dp_size} ranks; its output: {bench.output()}"]
    bench.stop()
    asked = monotonic()
    if not wait_until(bench.ended, END_S):
        return [f"the bench has not ended {END_S:g} s after it was stopped"]
    say(f"ended {monotonic() - asked:.1f} s after it was asked to")
    wait_until(lambda: not left_of(before, look()), END_S)
    say(f"{monotonic() - asked:.1f} s after it was asked to: {look()}")
    return left_of(before, look())


def main() -> int:
    options = _options()
    before = look()
    say(f"before: {before}")
    with TemporaryDirectory() as directory:
        bench: Bench
        if options.dashboard:
            say(f"ray job submit: {' '.join(BENCH)} {' '.join(options.flags)}")
            bench = JobBench(options.dashboard, options.flags)
        else:
            say("no job server here (ray[default] is missing): the same driver as a process,")
            say("ended by SIGTERM instead of `ray job stop`")
            bench = ProcessBench(options.cluster, options.flags, Path(directory, "bench.log"))
        dp_size = int(options.flags[options.flags.index("--dp-size") + 1])
        try:
            left = stop_in_mid_run(bench, dp_size, before)
        finally:
            if not bench.ended():
                bench.stop()
    for what in left:
        say(f"LEFT: {what}")
    if not left:
        say("nothing is left")
    return 1 if left else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cluster", required=True, help="host:port of a running Ray cluster")
    parser.add_argument("--dashboard", default="", help="its URL; none: no job server")
    parser.add_argument("flags", nargs="+", help="of launch.py bench; --dp-size must be one")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

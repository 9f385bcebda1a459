"""An exam in the form of MMMU-Pro against a server of its own, and a report of how it went.

    python -m examples.seed_run --out report
    python -m examples.seed_run --out report --compare --kill-rank-at 0.5

1,730 chats with one to three pictures each, 512 of them in flight. Flags that are not listed go to
`launch.py serve`. Writes OUT.md, OUT.json and the servers' logs; the exit status is 1 if anything
went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic

from examples.seed_run.client import Answer, Client
from examples.seed_run.report import write_report
from examples.seed_run.run import Run, differences, faults_of
from examples.seed_run.server import Loss, Server, serving
from examples.seed_run.workload import Chat, ExamShape, draw_exam

MODEL = Path(__file__).parents[1] / "tiny_vl" / "checkpoint"
SEED_FLAGS = (  # as in the run that crashed
    "--launcher", "local", "--page-size", "64", "--prefix-state-strategy", "extra_buffer",
    "--max-num-requests", "128",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options, given = _parser().parse_known_args(arguments)
    chats = draw_exam(ExamShape(options.chats, seed=options.seed))
    flags = "--model", str(options.model), *SEED_FLAGS, *given
    ranks, drafts = options.dp_size, options.speculative_num_steps
    exam = Exam(chats, options.in_flight, options.out, options.timeout_s)
    runs = [exam.run(f"{ranks} ranks", _with(flags, ranks, drafts), options.kill_rank_at)]
    if options.compare:
        runs.append(exam.run("one rank without drafts", _with(flags, 1, 0)))
    faults = [fault for run in runs for fault in faults_of(run, options.min_accuracy)]
    faults += [fault for other in runs[1:] for fault in differences(runs[0], other)]
    print(write_report(options.out, runs, faults))
    return 1 if faults else 0


def _with(flags: Sequence[str], dp_size: int, num_steps: int) -> tuple[str, ...]:
    return *flags, "--dp-size", str(dp_size), "--speculative-num-steps", str(num_steps)


@dataclass(frozen=True, eq=False)
class Exam:
    chats: Sequence[Chat]
    in_flight: int
    out: Path
    timeout_s: float

    def run(self, title: str, flags: Sequence[str], kill_rank_at: float | None = None) -> Run:
        """Start a server, have it answer all chats, and stop it."""
        log = self.out.with_name(f"{self.out.name} {title}.log".replace(" ", "-"))
        with serving(flags, log, self.timeout_s) as server:
            return self.answered_by(server, title, flags, kill_rank_at)

    def answered_by(
        self,
        server: Server,
        title: str,
        flags: Sequence[str] = (),
        kill_rank_at: float | None = None,
    ) -> Run:
        client = Client(server.url, self.in_flight, self.timeout_s)
        start = monotonic()
        answers, loss = asyncio.run(self._answers(client, server, title, kill_rank_at))
        seconds = monotonic() - start
        most, counted = client.most_in_flight, server.scrape_when_idle()
        return Run(title, flags, self.chats, answers, seconds, most, counted, loss)

    async def _answers(
        self, client: Client, server: Server, title: str, kill_rank_at: float | None
    ) -> tuple[Sequence[Answer], Loss | None]:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(client.ask_all(self.chats, title))
            loss = None
            if kill_rank_at is not None:
                count = round(kill_rank_at * len(self.chats))
                kill = partial(server.kill_a_rank, self.timeout_s)
                loss = await client.when_answered(count, kill)
        return asking.result(), loss


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.seed_run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", type=Path, default=MODEL, help="that reads images (default: tiny_vl)")
    add("--out", type=Path, default=Path("seed_run"), help="path of the report, without suffix")
    add("--chats", type=int, default=1730)
    add("--in-flight", type=int, default=512)
    add("--dp-size", type=int, default=4)
    add("--speculative-num-steps", type=int, default=3, metavar="STEPS",
        help="topk is 1, so a verification has one token more (default: 3)")  # fmt: skip
    add("--kill-rank-at", type=_fraction, metavar="FRACTION",
        help="kill -9 the process of a rank once so many chats are answered")  # fmt: skip
    add(
        "--compare",
        action="store_true",
        help="ask all chats of one rank without drafts too: the tokens must be the same",
    )
    add("--min-accuracy", type=_fraction, default=0.95)
    add("--seed", type=int, default=0)
    add("--timeout-s", type=float, default=3600.0, help="for a start, an answer, a recovery")
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


if __name__ == "__main__":
    sys.exit(main())

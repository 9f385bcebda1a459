"""An exam as a server has answered it, and what was wrong with that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from dp_runtime.cli.top.scrape import Scrape
from examples.seed_run.client import Answer
from examples.seed_run.server import Loss
from examples.seed_run.workload import Chat
from examples.tiny_vl.questions import letter_in

HELD = {
    "requests_running": "requests", "requests_queued": "queued requests",
    "kv_usage_ratio": "of its pages in use",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Counters:
    """What ranks have counted over an exam, also one that was killed."""

    last: Scrape
    loss: Loss | None  # whoever has the place of a killed rank counts anew

    @property
    def num_ranks(self) -> int:
        return len(self.last.dp_ranks)

    def total(self, name: str, **labels: str) -> float:
        total = self.last.sum(f"dp_runtime_{name}", **labels)
        if self.loss is not None:
            own = {"dp_rank": str(self.loss.dp_rank), **labels}
            total += self.loss.before.sum(f"dp_runtime_{name}", **own)
        return total

    def mean(self, name: str, **labels: str) -> float:
        """Return the mean of the ranks."""
        return self.total(name, **labels) / self.num_ranks

    def ratio(self, part: str, whole: str) -> float:
        total = self.total(whole)
        return self.total(part) / total if total else 0.0

    def by(self, name: str, *labels: str) -> dict[str, float]:
        """Return the mean of the ranks for each value of some labels."""
        samples = self.last.having(f"dp_runtime_{name}")
        values = {tuple(sample.labels[label] for label in labels) for sample in samples}
        return {
            " ".join(each): self.mean(name, **dict(zip(labels, each))) for each in sorted(values)
        }


@dataclass(frozen=True, eq=False)
class Run:
    """An exam as a server has answered it."""

    title: str
    flags: Sequence[str]  # of `launch.py serve`
    chats: Sequence[Chat]
    answers: Sequence[Answer]
    seconds: float
    most_in_flight: int
    counted: Scrape | None  # None: the server was gone
    loss: Loss | None = None

    @property
    def is_right(self) -> list[bool]:
        pairs = zip(self.chats, self.answers, strict=True)
        return [letter_in(answer.text) == chat.letter for chat, answer in pairs]


def faults_of(run: Run, min_accuracy: float) -> list[str]:
    """Everything that went wrong, in words; nothing if all went well."""
    pairs = enumerate(zip(run.chats, run.answers, strict=True))
    faults = [f"chat {number} {fault}" for number, pair in pairs for fault in _faults(*pair)]
    accuracy = fmean(run.is_right)
    if accuracy < min_accuracy:
        faults.append(f"{accuracy:.1%} of the answers are right, not {min_accuracy:.1%}")
    if run.counted is None:
        faults.append("the server was gone after the last answer")
    else:
        faults += _left_behind(run.counted)
    return [f"{run.title}: {fault}" for fault in faults]


def _faults(chat: Chat, answer: Answer) -> Iterator[str]:
    if answer.error:
        yield f"was not answered: {answer.error}"
        return
    count, most = len(answer.token_ids), chat.max_tokens
    ends = {"length"} if chat.is_endless else {"stop", "length"}
    complete = count == most or (answer.finish_reason == "stop" and 0 < count < most)
    if answer.finish_reason not in ends or not complete:
        yield f"ended by {answer.finish_reason!r} after {count} of {most} tokens"


def _left_behind(counted: Scrape) -> Iterator[str]:
    """Tell what ranks still hold after the last answer."""
    for rank in counted.dp_ranks:
        for name, what in HELD.items():
            if held := counted.sum(f"dp_runtime_{name}", dp_rank=rank):
                yield f"rank {rank} still has {held:g} {what}"


def differences(run: Run, reference: Run) -> list[str]:
    """The chats whose tokens are not those of another run, and where they part."""
    found = []
    for number, (own, other) in enumerate(zip(run.answers, reference.answers, strict=True)):
        if own.token_ids != other.token_ids:
            pairs = enumerate(zip(own.token_ids, other.token_ids))
            at = next((at for at, (one, two) in pairs if one != two), "its end")
            found.append(f"{run.title}: chat {number} differs from {reference.title} at token {at}")
    return found

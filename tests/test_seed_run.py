"""The exam of examples/seed_run at a size for every day, and that its report sees what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_runtime.cli.top.scrape import Scrape
from examples.seed_run.__main__ import MODEL, Exam, main
from examples.seed_run.client import Answer
from examples.seed_run.report import write_report
from examples.seed_run.run import Counters, Run, differences, faults_of
from examples.seed_run.server import Loss, Server
from examples.seed_run.workload import Chat, ExamShape, draw_exam
from tests.dp_runtime.server.served import serving

CHATS = draw_exam(ExamShape(40, answer_tokens=20))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The same exam of two ranks with drafts, and of one without."""
    exam = Exam(CHATS, 24, tmp_path_factory.mktemp("exam"), 60.0)
    sizes: dict[str, dict[str, Any]] = {
        "two ranks": {"dp_size": 2, "speculative_num_steps": 3}, "one rank": {"dp_size": 1},
    }  # fmt: skip
    found = []
    for title, fields in sizes.items():
        with serving(model=str(MODEL), device="cpu", num_pages=200, **fields) as served:
            found.append(exam.answered_by(Server(served.url), title))
            served.check_idle()
    return found


def test_all_are_answered_right_and_as_by_one_rank_without_drafts(runs: list[Run]) -> None:
    assert [fault for run in runs for fault in faults_of(run, min_accuracy=0.9)] == []
    assert differences(*runs) == []
    assert [run.most_in_flight for run in runs] == [24, 24]


def test_a_report_has_what_was_seen_and_counted(runs: list[Run], tmp_path: Path) -> None:
    text = write_report(tmp_path / "report", runs, ["chat 7 is late"])
    assert text == (tmp_path / "report.md").read_text()
    assert "| answered | 40 | 40 |" in text
    assert "- chat 7 is late\n" in text
    content = json.loads((tmp_path / "report.json").read_text())
    two, one = content["runs"]
    assert content["faults"] == ["chat 7 is late"]
    assert 0 == one["padding waste"] < two["padding waste"] < 1
    assert one["accepted length"] == 1 < two["accepted length"] <= 4
    assert {"encode", "target", "draft", "wait"} <= two["seconds of a rank"].keys()
    assert two["seconds of a rank"]["encode"] > 0
    assert one["passes of a rank"]["target eager"] == one["steps of a rank"]
    assert two["output tokens"] == one["output tokens"]


def test_an_exam_is_varied_and_always_the_same() -> None:
    chats, again = (draw_exam(ExamShape(150)) for _ in range(2))
    assert [chat.body for chat in chats] == [chat.body for chat in again]
    assert {chat.num_images for chat in chats} == {1, 2, 3}
    contents = [chat.messages[0]["content"] for chat in chats]
    asked = {json.dumps(content) for content in contents}
    assert 0.05 < 1 - len(asked) / len(chats) < 0.2, "some are asked again"
    words = np.array([len(content[-1]["text"].split()) for content in contents])
    assert words.max() > 10 * np.median(words)
    assert max(content[-1]["text"].count("\nJ.") for content in contents) == 1
    tails = [chat.max_tokens for chat in chats if chat.is_endless]
    assert 0.05 < len(tails) / len(chats) < 0.2
    assert max(tails) > 2 * np.median(tails)


def page(*num_passes: int, **held: float) -> Scrape:
    """What ranks have counted, and what rank 1 holds."""
    lines = [f'steps_total{{dp_rank="{rank}"}} 1' for rank in range(len(num_passes))]
    for rank, count in enumerate(num_passes):
        lines.append(f'passes_total{{dp_rank="{rank}",pass="target",mode="eager"}} {count}')
    lines += [f'{name}{{dp_rank="1"}} {value}' for name, value in held.items()]
    return Scrape.parsed("".join(f"dp_runtime_{line}\n" for line in lines), "{}")


def test_what_a_killed_rank_had_counted_is_not_lost() -> None:
    loss = Loss(1, 4711, 3, 0.5, page(70, 50))
    counters = Counters(page(100, 20), loss)
    assert counters.total("passes_total") == 100 + 20 + 50
    assert counters.by("passes_total", "pass", "mode") == {"target eager": 85}
    assert Counters(page(100, 20), None).mean("passes_total") == 60


def right_answer(chat: Chat) -> Answer:
    count = chat.max_tokens if chat.is_endless else 5
    reason = "length" if chat.is_endless else "stop"
    return Answer(f"It is. Answer: {chat.letter}", (1,) * count, 9, reason, 0.1)


RIGHT = Run("it", (), CHATS, [right_answer(chat) for chat in CHATS], 1.0, 24, page(1, 1))
ENDLESS = next(number for number, chat in enumerate(CHATS) if chat.is_endless)
ENDING = next(number for number, chat in enumerate(CHATS) if not chat.is_endless)


def changed(number: int, **fields: Any) -> Run:
    answers = [*RIGHT.answers]
    answers[number] = replace(answers[number], **fields)
    return replace(RIGHT, answers=answers)


FAULTS: dict[str, Callable[[], Run]] = {
    "not answered: APIError: no": lambda: changed(3, error="APIError: no"),
    "ended by 'abort' after 5 of 20": lambda: changed(ENDING, finish_reason="abort"),
    "ended by 'stop' after 0 of 20": lambda: changed(ENDING, token_ids=()),
    "ended by 'length' after 5 of 20": lambda: changed(ENDING, finish_reason="length"),
    "ended by 'length' after 1 of": lambda: changed(ENDLESS, token_ids=(1,)),
    "ended by 'stop' after": lambda: changed(ENDLESS, finish_reason="stop"),
    "97.5% of the answers are right, not 100.0%": lambda: changed(7, text="Answer: ?"),
    "the server was gone": lambda: replace(RIGHT, counted=None),
    "rank 1 still has 2 requests": lambda: replace(RIGHT, counted=page(1, 1, requests_running=2)),
    "rank 1 still has 1 queued": lambda: replace(RIGHT, counted=page(1, 1, requests_queued=1)),
    "rank 1 still has 0.5 of its pages": lambda: replace(
        RIGHT, counted=page(1, 1, kv_usage_ratio=0.5)
    ),
}  # fmt: skip


def test_a_right_run_has_no_fault() -> None:
    assert faults_of(RIGHT, 1.0) == differences(RIGHT, RIGHT) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str) -> None:
    found = faults_of(FAULTS[fault](), 1.0 if "right" in fault else 0.9)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(("tokens", "place"), [((1, 2) * 3, "1"), ((1,), "its end")])
def test_other_tokens_are_seen(tokens: tuple[int, ...], place: str) -> None:
    (found,) = differences(changed(ENDING, token_ids=tokens), RIGHT)
    assert found == f"it: chat {ENDING} differs from it at token {place}"


@pytest.mark.slow
def test_nothing_is_lost_with_a_rank_that_is_killed_halfway(tmp_path: Path) -> None:
    """Four ranks with drafts, each a process, answer as one does without."""
    command = ["--chats", 200, "--in-flight", 100, "--kill-rank-at", 0.5, "--compare"]
    assert main([*map(str, command), "--out", str(tmp_path / "report")]) == 0
    first = json.loads((tmp_path / "report.json").read_text())["runs"][0]
    assert first["answered"] == 200
    assert first["loss"]["running"] > 0

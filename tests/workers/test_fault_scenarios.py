"""Seeded faults in the midst of loads: every request ends with the tokens of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dp_runtime import Engine, SamplingParams, StructuredOutputs
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.speculative_cases import TRAINED, engine_of
from tests.structured_cases import CHOICES, REGEXES
from tests.workers.disturbed import WAIT_S, alike, delivered, recovering, submitted
from tests.workers.leftovers import wait_until
from tests.workers.test_watch import nothing_left

NUM_EPOCHS = 1000  # of an engine of a long run, some of which have a fault of their own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("scenarios")))


@pytest.fixture(autouse=True)
def no_request_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dp_runtime.engine.routing.relocation.MAX_REPLAYS", 100)


def pids_of(engine: Engine) -> dict[int, int]:
    """Processes by rank, of those that answer."""
    return {rank.dp_rank: rank.pid for rank in engine.health() if rank.pid}


def send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it may have ended of another fault
            os.kill(pid, number)


def victims(engine: Engine, draw: random.Random, count: int = 1) -> list[int]:
    pids = sorted(pids_of(engine).values())
    return draw.sample(pids, min(count, len(pids)))


def kill_after(seconds: float, engine: Engine, draw: random.Random, count: int = 1) -> None:
    pids = victims(engine, draw, count)
    time.sleep(draw.uniform(0, seconds))
    send(pids, signal.SIGKILL)


def kill_successor(engine: Engine, draw: random.Random) -> None:
    """Kill a rank, and the process that takes its place as soon as it answers."""
    before = pids_of(engine)
    rank = draw.choice(sorted(before))
    send([before[rank]], signal.SIGKILL)
    wait_until(lambda: pids_of(engine).get(rank, before[rank]) != before[rank], "it starts", WAIT_S)
    time.sleep(draw.uniform(0, 0.3))
    send([pids_of(engine).get(rank, before[rank])], signal.SIGKILL)


def kill_three(engine: Engine, draw: random.Random) -> None:
    for _ in range(3):
        kill_after(0.7, engine, draw)


def stop(engine: Engine, draw: random.Random) -> None:
    send(victims(engine, draw), signal.SIGSTOP)


def stop_and_continue(engine: Engine, draw: random.Random) -> None:
    """It may go on before it counts as lost, while it is replaced, or be gone."""
    pids = victims(engine, draw)
    send(pids, signal.SIGSTOP)
    time.sleep(draw.uniform(1.0, 3.5))
    send(pids, signal.SIGCONT)


Act = Callable[[Engine, random.Random], None]
ACTS: dict[str, Act] = {
    "prompts": partial(kill_after, 0.1),
    "tokens": partial(kill_after, 1.0),
    "late, or idle": partial(kill_after, 3.0),
    "successor": kill_successor,
    "two at once": partial(kill_after, 0.5, count=2),
    "three in a row": kill_three,
    "stop": stop,
    "stop and continue": stop_and_continue,
}


def faults_within_steps(dp_size: int) -> str:
    """Every third epoch has a fault while the other ranks wait in a collective."""
    draw = random.Random(dp_size)
    return ";".join(
        f"rank={draw.randrange(dp_size)},step={draw.randrange(40)},epoch={epoch},"
        f"kind={draw.choice(('kill', 'raise', 'mismatch'))}"
        for epoch in range(1, NUM_EPOCHS, 3)
    )


class Scenarios:
    """An engine with the tokens of its undisturbed loads, which outlives all that happens to it."""

    def __init__(self, engine: Engine, num_loads: int) -> None:
        self.engine, self._seeds = engine, range(num_loads)
        self._expected = alike(self._serve())

    def check(self, act: Act, draw: random.Random) -> None:
        acting = threading.Thread(target=act, args=(self.engine, draw))
        acting.start()
        tokens = alike(self._serve())
        acting.join()
        assert tokens == self._expected
        wait_until(self._is_idle, "all ranks serve, and no page is taken", WAIT_S)

    def _serve(self) -> list[Any]:
        handles = [handle for seed in self._seeds for handle in submitted(self.engine, seed)]
        return delivered(handles)

    def _is_idle(self) -> bool:
        ranks = self.engine.health()
        free = all(rank.free_pages == rank.num_pages - 1 for rank in ranks)
        return free and len({rank.epoch for rank in ranks}) == 1


@contextmanager
def scenarios(
    model: Path, launcher: str, num_loads: int = 1, dp_size: int = 3, **fields: Any
) -> Iterator[Scenarios]:
    own = {"max_recoveries": 10_000, "inject": faults_within_steps(dp_size), "dp_size": dp_size}
    with nothing_left(), recovering(model, launcher, **own, **fields) as engine:
        yield Scenarios(engine, num_loads)


@pytest.mark.slow
def test_an_engine_outlives_faults_of_every_phase(model: Path) -> None:
    draw = random.Random(14)
    with scenarios(model, "local", speculative_num_steps=2) as these:
        for name in ("successor", "stop and continue"):
            these.check(ACTS[name], draw)


@pytest.mark.slow
@pytest.mark.parametrize("num_drafts", [0, 2])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.timeout(900)
def test_10_scenarios_with_200_requests(model: Path, num_drafts: int, seed: int) -> None:
    draw = random.Random(seed)
    fields = {"num_loads": 5, "dp_size": 4, "speculative_num_steps": num_drafts}
    with scenarios(model, "local", **fields) as these:
        for number in range(10):
            these.check(list(ACTS.values())[(number + seed) % len(ACTS)], draw)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_scenarios_over_ray(model: Path, num_drafts: int) -> None:
    draw = random.Random(num_drafts)
    with scenarios(model, "ray", speculative_num_steps=num_drafts) as these:
        for act in ACTS.values():
            these.check(act, draw)


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_structured_outputs_go_on_in_their_form(num_drafts: int) -> None:
    wanted = [
        *(StructuredOutputs(regex=regex) for regex in REGEXES[:5]),
        *(StructuredOutputs(choice=choices) for choices in CHOICES[1:4]),
    ]
    params = [
        SamplingParams(max_tokens=60, seed=n, temperature=n % 2, structured_outputs=one)
        for n, one in enumerate(wanted * 3)
    ]
    prompts = [f"The value of number {index} is " for index in range(len(params))]
    inject = "rank=0,step=4,kind=raise;rank=1,step=6,kind=raise,epoch=1"
    with engine_of(TRAINED, num_drafts, 2, max_model_len=256, inject=inject) as engine:
        disturbed = engine.generate(prompts, params)
        assert {rank.epoch for rank in engine.health()} == {2}
        expected = engine.generate(prompts, params)
    assert [one.text for one in disturbed] == [one.text for one in expected]
    assert alike(disturbed) == alike(expected)
